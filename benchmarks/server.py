"""Starting the service for a measurement, as a user would: the command line, its own process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_URL = re.compile(r" serves .* at (http://\S+)")


@contextmanager
def running_server(url: str | None, options: Sequence[str]) -> Iterator[str]:
    """Yield the URL of a server: the given one, or one started with `options` and ended after."""
    if url is not None:
        yield url.rstrip("/")
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _wait_for_url(process)
    finally:
        process.terminate()
        process.wait(60)


def _wait_for_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if match := _URL.search(line):
            return match[1]
    raise RuntimeError("the server did not start; its error is above")
