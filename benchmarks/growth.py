"""How cost grows with load: a step and what the host adds to it, by batch, context and queue.

    python -m benchmarks.growth --plot docs/growth.svg

An engine in this process decodes; what scheduling, layout and commit take of its steps is timed
within them, by the clock of the engine's own thread. One thing grows at a time: requests that
decode, their context, requests that wait. Then the memory of requests that wait: of their
records in the engine, and of open streams on an idle server. The bar: the host takes 2 % of a step.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.growth_plot import Curve, Panel, growth_plot
from benchmarks.inprocess import (
    COMPILED,
    Running,
    TokenClock,
    machine,
    passing,
    running,
    served_base,
)
from benchmarks.load import metric, ours, send
from benchmarks.server import running_server
from pruning.families import kv_shape
from pruning.loading import EMBEDDED_MODEL, BaseModel
from pruning.variants import FULL, Variant, Variants
from server.engine.assembly import EngineConfig
from server.engine.batch import Batches
from server.engine.engine import Engine
from server.engine.request import Event, Request, SamplingParams, Sink
from server.engine.scheduler import Limits, Scheduler

BAR = 0.02
GPU_STEP = 0.005
"""Seconds of a fast step on a GPU, of which the host's share is printed too."""
_CONTEXT, _BATCH = 64, 8
"""Where they do not grow."""
_PATIENCE = 600.0
_POLL = 0.01
_PROMPT = 128
"""Tokens of a request whose memory is measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """One point, medians and means over its steps."""

    grows: str
    running: int
    context: int
    queued: int
    step: float
    """Seconds between tokens, median."""
    host: float
    """Seconds a step in scheduling, layout and commit, on the engine's thread, mean."""

    @property
    def share(self) -> float:
        return self.host / self.step


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of waiting requests, of 128 prompt tokens each."""

    queued: int
    engine_request: float
    """Of each request that waits in the engine."""
    idle_server: float
    """Resident memory of a server that has answered one request."""
    streams: int
    server_stream: float
    """Of each open stream that waits on it, its request included."""


@dataclass(slots=True)
class HostClock:
    """Adds up the time that one thread spends in some functions, and their steps."""

    seconds: float = 0.0
    steps: int = 0
    _inside: bool = field(default=False)

    def around(self, work: Callable[..., Any], *, step: bool = False) -> Callable[..., Any]:
        """Return `work`, timed; what it calls of the others is not counted twice."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return work(*arguments, **named)
            self._inside, before = True, time.thread_time()
            try:
                return work(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - before
                self.steps += step
                self._inside = False

        return timed


@contextmanager
def host_clock() -> Iterator[HostClock]:
    """Time what every engine in this process does on the host, but for waiting for a step."""
    clock = HostClock()
    with (
        patch.object(Scheduler, "schedule", clock.around(Scheduler.schedule, step=True)),
        patch.object(Scheduler, "advance", clock.around(Scheduler.advance)),
        patch.object(Batches, "of", clock.around(Batches.of)),
        patch.object(Engine, "_commit_token", clock.around(Engine._commit_token)),
        patch.object(Engine, "_commit_scores", clock.around(Engine._commit_scores)),
    ):
        yield clock


def main(
    model: Annotated[str, typer.Option(help="What to measure.")] = EMBEDDED_MODEL,
    batch: Annotated[str, typer.Option(help="Requests that decode.")] = "1,8,64,256,1000",
    context: Annotated[str, typer.Option(help="Tokens of each.")] = "64,512,2048,4096",
    queued: Annotated[str, typer.Option(help="Requests that wait.")] = "0,100,1000,10000",
    steps: Annotated[int, typer.Option(min=2, help="Steps of a point.")] = 16,
    streams: Annotated[int, typer.Option(help="Open streams of the memory figure.")] = 500,
    plot: Annotated[Path | None, typer.Option(help="Write the plot as SVG.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure how cost grows."""
    base = passing(lambda: served_base(model))
    batches, contexts, queues = (_numbers(text) for text in (batch, context, queued))
    with _engine(base, _BATCH, _CONTEXT + 8 * steps, max(queues)) as started:
        # First of all, while there is no memory of earlier requests to be used again.
        per_request = request_bytes(started, _BATCH, max(queues))
        rows = [measure(started, "queue", _BATCH, _CONTEXT, size, steps) for size in queues]
    rows += [_alone(base, "batch", size, _CONTEXT, steps) for size in batches]
    rows += [_alone(base, "context", _BATCH, length, steps) for length in contexts]
    idle, per_stream = _server_memory(model, streams)
    memory = Memory(max(queues), per_request, idle, streams, per_stream)
    _print(rows, memory)
    if plot is not None:
        plot.write_text(growth_plot(panels(rows), "ms"), encoding="utf-8")
    if output is not None:
        points = [{**asdict(row), "share": row.share} for row in rows]
        body = {"machine": machine(base.device), "rows": points, "memory": asdict(memory)}
        output.write_text(json.dumps(body, indent=2) + "\n")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@contextmanager
def _engine(base: BaseModel, at_once: int, tokens: int, waiting: int) -> Iterator[Running]:
    """Yield a started engine that runs so many requests of so many tokens at once."""
    variants = Variants(base.layers, [Variant(FULL, frozenset(range(base.layers)))])
    limits = Limits(tokens_per_step=at_once + 512, running=at_once, waiting=at_once + waiting)
    shape = kv_shape(base.model.config.get_text_config())
    a_token = base.layers * shape.bytes_per_token(base.model.dtype.itemsize)
    pool = int(1.1 * at_once * (tokens + 32) * a_token)
    config = EngineConfig(limits, kv_cache_bytes=pool, compiled=COMPILED)
    with running(base, variants, config) as started:
        yield started


def _alone(base: BaseModel, grows: str, at_once: int, context: int, steps: int) -> Row:
    """Measure without a queue. Requests that are prefilled first decode meanwhile: that is what
    the tokens beyond the window are for."""
    meanwhile = at_once * context // 512 + 32
    with _engine(base, at_once, context + meanwhile + steps, 0) as started:
        return measure(started, grows, at_once, context, 0, steps)


def measure(
    started: Running, grows: str, at_once: int, context: int, queued: int, steps: int
) -> Row:
    """Time steps in which `at_once` requests decode and `queued` others wait."""
    clocks, requests = _requests(started, at_once, context)
    with host_clock() as host:
        started.engine.submit(requests)
        _wait_until(lambda: all(clock.times for clock in clocks))
        queue = _queue(started, queued)
        started.engine.submit(queue)
        queued_at = _tokens(clocks[-1])
        _wait_until(lambda: _tokens(clocks[-1]) >= queued_at + 2)
        begun = _tokens(clocks[-1])  # more, where steps are shorter than a look at them
        seconds, counted = host.seconds, host.steps
        _wait_until(lambda: _tokens(clocks[-1]) > begun + steps)
        seconds, counted = host.seconds - seconds, host.steps - counted
    window = clocks[-1].times[begun : begun + steps + 1]
    _leave(started, [*requests, *queue], clocks)
    step = statistics.median(after - before for before, after in pairwise(window))
    return Row(grows, at_once, context, queued, step, seconds / counted)


def request_bytes(started: Running, at_once: int, queued: int) -> float:
    """Return what one request adds to the memory of an engine in which all places are taken."""
    if not queued:
        return 0.0
    clocks, requests = _requests(started, at_once, _CONTEXT)
    started.engine.submit(requests)
    _wait_until(lambda: all(clock.times for clock in clocks))
    gc.collect()
    before = _resident()
    queue = _queue(started, queued)
    started.engine.submit(queue)
    _wait_until(lambda: started.engine.stats().variants[0].waiting == queued)
    after = _resident()
    _leave(started, [*requests, *queue], clocks)
    return (after - before) / queued


class _Nobody:
    """The sink of requests that only wait."""

    def put(self, event: Event) -> None:
        del event


def _requests(started: Running, count: int, prompt: int) -> tuple[list[TokenClock], list[Request]]:
    """Return requests that do not end by themselves, and their sinks."""
    clocks = [TokenClock() for _ in range(count)]
    return clocks, [_request(started, prompt, clock) for clock in clocks]


def _queue(started: Running, count: int) -> list[Request]:
    nobody = _Nobody()
    return [_request(started, _PROMPT, nobody) for _ in range(count)]


def _request(started: Running, prompt: int, sink: Sink) -> Request:
    tokens = tuple(random.choices(range(started.vocabulary), k=prompt))
    endless = SamplingParams(started.engine.limit(FULL) - prompt, temperature=0.0)
    return Request(uuid.uuid4().hex, tokens, FULL, endless, sink, time.monotonic())


def _leave(started: Running, requests: Sequence[Request], clocks: Sequence[TokenClock]) -> None:
    """Abort requests, those that wait first, and wait until all of those with clocks ended."""
    for request in reversed(requests):
        started.engine.abort(request.id)
    for clock in clocks:
        clock.wait_end()


def _tokens(clock: TokenClock) -> int:
    """Return how many tokens came.

    Raises:
        RuntimeError: the request has ended, so that no more will.
    """
    if clock.end is not None:
        raise RuntimeError(f"a request ended while its steps were timed: {clock.end}")
    return len(clock.times)


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing came for {_PATIENCE:.0f} s")
        time.sleep(_POLL)


def _resident() -> int:
    """Return this process's resident memory in bytes, as Linux tells it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _server_memory(model: str, streams: int) -> tuple[float, float]:
    """Return the resident bytes of an idle server, and what each open stream that waits adds."""
    options = ["--model", model, "--max-running", "1", "--max-waiting", str(streams + 1)]
    with running_server(None, options) as url:
        return asyncio.run(_waiting_streams(url, streams))


async def _waiting_streams(url: str, streams: int) -> tuple[float, float]:
    await send(ours(url, FULL), list(range(10, 10 + _PROMPT)), 2)
    idle = await _of_server(url)
    tasks = [
        asyncio.create_task(send(ours(url, FULL), [10 + index] * _PROMPT, 500))
        for index in range(streams + 1)
    ]
    deadline = time.monotonic() + _PATIENCE
    while await _of_server(url, "attndrop_requests_waiting", 'variant="full"') < streams:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{streams} streams did not come to wait")
        await asyncio.sleep(0.2)
    after = await _of_server(url)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return idle, (after - idle) / streams


async def _of_server(
    url: str, name: str = "process_resident_memory_bytes", label: str = ""
) -> float:
    async with httpx.AsyncClient(timeout=60) as client:
        return metric((await client.get(f"{url}/metrics")).text, name, label)


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Return a panel for each thing that grows; no queue is drawn as a queue of one."""
    labels = {
        "batch": "requests that decode",
        "context": "tokens of context",
        "queue": "requests that wait",
    }
    return [
        Panel(f"{grows} grows", label, (_curve("step", some), _curve("host's part", some)))
        for grows, label in labels.items()
        if (some := [row for row in rows if row.grows == grows])
    ]


def _curve(name: str, rows: Sequence[Row]) -> Curve:
    """Return milliseconds over what grows."""
    return Curve(
        name,
        tuple(
            (
                {"batch": row.running, "context": row.context, "queue": max(1, row.queued)}[
                    row.grows
                ],
                1e3 * (row.step if name == "step" else row.host),
            )
            for row in rows
        ),
    )


def _print(rows: Sequence[Row], memory: Memory) -> None:
    table = Table(title=f"the host's part of a step; bar: {BAR:.0%}")
    for heading in ("grows", "running", "context", "queued", "step ms", "host µs", "of the step"):
        table.add_column(heading, justify="left" if heading == "grows" else "right")
    table.add_column(f"of {GPU_STEP * 1e3:g} ms", justify="right")
    for row in rows:
        table.add_row(
            row.grows,
            f"{row.running:,}",
            f"{row.context:,}",
            f"{row.queued:,}",
            f"{row.step * 1e3:.1f}",
            f"{row.host * 1e6:.0f}",
            f"{row.share:.2%}" + ("" if row.share <= BAR else " !"),
            f"{row.host / GPU_STEP:.2%}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"idle server: {memory.idle_server / 2**20:.0f} MiB; a request that waits: "
        f"{memory.engine_request / 1024:.1f} KiB in the engine ({memory.queued:,} of them), "
        f"{memory.server_stream / 1024:.1f} KiB as an open stream ({memory.streams:,} of them)"
    )


if __name__ == "__main__":
    typer.run(main)
