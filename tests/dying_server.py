"""A real server whose engine breaks on the first request that says so.

python -m tests.dying_server
"""

from __future__ import annotations

import gc
import sys
import threading

from pruning.calibration import silent
from server.config import Settings
from server.lifecycle import Server, bind
from server.startup import start


def main() -> int:
    servers: list[Server] = []
    kept: list[int] = []
    # A compiler at work in the background would be waited for.
    settings = Settings(port=0, kv_cache_memory="64MiB", enforce_eager=True)
    started = start(settings, silent, lambda: servers[0].engine_died())

    def break_the_engine() -> None:
        raise ZeroDivisionError("broken on purpose")

    def up(url: str) -> None:
        kept.append(gc.get_freeze_count())
        print(f"attndrop serves it at {url}", flush=True)
        threading.Timer(2, lambda: started.engine._commands.put(break_the_engine)).start()

    servers.append(
        Server(started.app, started.service, started.engine, drain_timeout=1, when_up=up)
    )
    servers[0].run([bind(settings.host, settings.port)])
    assert kept[0] > gc.get_freeze_count() == 0, "kept from the collector while it serves only"
    return servers[0].exit_status


if __name__ == "__main__":
    sys.exit(main())
