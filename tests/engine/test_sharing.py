"""All variants run from one copy of the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def resident_bytes(variants: int) -> int:
    """Return the memory of a process that has served this many variants of the real model."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.resident", str(variants)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # one heap: figures repeat within 0.3%
    )
    return int(run.stdout)


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's own account"
)
def test_memory_does_not_grow_with_variants() -> None:
    one, four = resident_bytes(1), resident_bytes(4)
    print(f"1 variant {one / 2**20:.1f} MiB, 4 variants {four / 2**20:.1f} MiB")
    assert abs(four - one) / one < 0.01
