"""A real server: the command line in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx

START_SECONDS = 600
_URL = re.compile(r"serves (?P<model>\S+) at (?P<url>http://\S+)")


class LiveServer:
    """A running `attndrop serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output: list[str] = []
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if match := _URL.search(line):
                self.url = match["url"]

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.url:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start:\n" + "".join(self.output))
            time.sleep(0.05)

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)  # type: ignore[arg-type]

    def terminate(self, within: float = 60) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)

    def metric(self, name: str, **labels: str) -> float:
        """Return one sample of /metrics."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.client().get("/metrics").text.splitlines():
            if line.startswith(f"{name}{{") and all(label in line for label in wanted):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(f"{name} {labels}")


@contextmanager
def serve(
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    command: str = "serve",
) -> Iterator[LiveServer]:
    """Start a server (or a gateway) with `options` and end it afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", command, "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200", **(environment or {})},
    )
    server = LiveServer(process)
    try:
        server.wait_until_up()
        yield server
    finally:
        process.kill()
        process.wait()
