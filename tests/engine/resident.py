"""Prints the memory of a process that serves as many variants as its argument says.

Anonymous memory in bytes: weights, pages and all else that is not a file shared by the machine.

    python -m tests.engine.resident 4
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

from pruning.loading import EMBEDDED_MODEL, load_base_model
from server.engine.assembly import EngineConfig, build_engine
from tests.engine.tiny_engine import Numbered, recorder, tiny_variants

ORDER = [25, 26, 29, 28, 7, 6, 5, 22, 9, 17, 14, 27, 13, 8, 4]
"""Layers in an order in which they may be dropped."""


def main(count: int) -> None:
    base = load_base_model(EMBEDDED_MODEL, dtype="float32", device="cpu")
    dropped = {f"drop{n}": set(ORDER[:n]) for n in (4, 8, 15)[: count - 1]}
    variants = tiny_variants(base.layers, **dropped)
    assert len(variants) == count
    engine = build_engine(base, variants, EngineConfig(kv_cache_bytes=1 << 28))
    engine.start()
    new = Numbered()
    names = [variant.name for variant in variants]
    requests = [new.request(range(10, 74), names[i % count], max_tokens=16) for i in range(4)]
    engine.submit(requests)
    for request in requests:
        recorder(request).wait(240)
    engine.stop()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    rollup = Path("/proc/self/smaps_rollup").read_text()
    print(int(rollup.split("Pss_Anon:")[1].split()[0]) * 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]))
