"""What the gateway adds to a stream: time to first token and inter-token latency, beside direct.

    python -m benchmarks.gateway --streams 1,32
    python -m benchmarks.gateway --upstream http://127.0.0.1:8000 --model MODEL

Without --upstream, the upstream is `benchmarks.paced`, whose tokens come at fixed times, so that
what differs is the gateway. Direct and through the gateway take turns.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.inprocess import machine
from benchmarks.paced import MODEL

TURNS = 3
"""How often direct and gateway are measured, in turns."""

_URL = re.compile(r" serves .* at (http://\S+)")


@dataclass(frozen=True, slots=True)
class Row:
    """One measure at one number of streams, in milliseconds."""

    streams: int
    measure: str
    direct_p50: float
    direct_p99: float
    gateway_p50: float
    gateway_p99: float

    @property
    def added(self) -> tuple[float, float]:
        return self.gateway_p50 - self.direct_p50, self.gateway_p99 - self.direct_p99


@dataclass(frozen=True, slots=True)
class Load:
    """What every client asks for."""

    model: str
    tokens: int
    rounds: int
    """Streams, one after the other."""
    spread: float
    """Seconds over which the clients begin; 0 for a burst."""


@dataclass(slots=True)
class Times:
    """Seconds, of all streams of one kind."""

    first: list[float]
    between: list[float]

    def add(self, asked: float, arrived: Sequence[float]) -> None:
        self.first.append(arrived[0] - asked)
        self.between.extend(after - before for before, after in pairwise(arrived))


async def one_stream(url: str, model: str, tokens: int, times: Times) -> None:
    """Ask for a stream over a connection of its own and note when each token came."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = json.dumps({"model": model, "prompt": "x", "max_tokens": tokens, "stream": True})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json"
    )
    asked = time.perf_counter()
    writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    arrived = []
    while (line := await reader.readline()) != b"data: [DONE]\n":
        if not line:
            raise RuntimeError(f"{url} ended its stream early")
        if line.startswith(b"data: "):
            arrived.append(time.perf_counter())
    writer.close()
    times.add(asked, arrived)


async def streams_at_once(load: Load, url: str, count: int, times: Times) -> None:
    """Keep `count` streams open: each begins its next one when one has ended."""

    async def client(index: int) -> None:
        await asyncio.sleep(load.spread * index / count)
        for _ in range(load.rounds):
            await one_stream(url, load.model, load.tokens, times)

    await asyncio.gather(*(client(index) for index in range(count)))


def measure(direct: str, gateway: str, streams: int, load: Load) -> list[Row]:
    """Return the rows for one number of streams."""
    found = {direct: Times([], []), gateway: Times([], [])}
    warm_up = replace(load, rounds=1)
    for url in found:
        asyncio.run(streams_at_once(warm_up, url, streams, Times([], [])))
    for _ in range(TURNS):
        for url, times in found.items():
            asyncio.run(streams_at_once(load, url, streams, times))
    first = [_percentiles(found[url].first) for url in (direct, gateway)]
    between = [_percentiles(found[url].between) for url in (direct, gateway)]
    return [
        Row(streams, "time to first token", *first[0], *first[1]),
        Row(streams, "inter-token latency", *between[0], *between[1]),
    ]


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the 50th and 99th percentile, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return 1000 * statistics.median(seconds), 1000 * cuts[98]


@contextmanager
def running(*command: str) -> Iterator[str]:
    """Run a module that says where it serves; yields its URL."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _URL.search(line):
                yield match[1]
                return
        raise RuntimeError(f"{command[0]} did not start; its error is above")
    finally:
        process.terminate()
        process.wait(60)


def main(
    streams: Annotated[str, typer.Option(help="Numbers of streams at once.")] = "1,32",
    rounds: Annotated[int, typer.Option(min=1, help="Streams that one client asks for.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a stream.")] = 64,
    spread: Annotated[float, typer.Option(help="Seconds over which the clients begin.")] = 1.3,
    upstream: Annotated[str | None, typer.Option(help="A server's URL.")] = None,
    model: Annotated[str, typer.Option(help="Its model.")] = MODEL,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure and print."""
    rows: list[Row] = []
    with ExitStack() as stack:
        direct = upstream or stack.enter_context(running("benchmarks.paced"))
        options = ("--upstream", f"full={direct}", "--port", "0", "--log-level", "warning")
        gateway = stack.enter_context(running("server.cli", "gateway", *options))
        for count in map(int, streams.split(",")):
            load = Load(model, tokens, rounds, spread)
            rows.extend(measure(direct, gateway, count, load))
    _print(rows)
    if output is not None:
        content = {"machine": machine(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(content, indent=2) + "\n")


def _print(rows: Sequence[Row]) -> None:
    table = Table(title="milliseconds, p50 / p99")
    for heading in ("streams", "measure", "direct", "gateway", "added"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for row in rows:
        table.add_row(
            str(row.streams),
            row.measure,
            f"{row.direct_p50:.2f} / {row.direct_p99:.2f}",
            f"{row.gateway_p50:.2f} / {row.gateway_p99:.2f}",
            "{:.2f} / {:.2f}".format(*row.added),
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
