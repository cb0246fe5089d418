"""What a streamed token costs the thread that serves HTTP, with an engine that computes nothing.

    python -m benchmarks.streams --streams 32

Tokens come as from a GPU: a step is launched by `--launches` small operations, each of which lets
the interpreter's lock go as CUDA launches do, and takes the device `--step-ms`; it is launched
while the one before still runs. So the engine's thread loses time to HTTP only where it waits for
the lock, and the table shows how much: steps without HTTP, and with it. Everything else is the
server as it is: real sockets, clients in a process of their own.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.inprocess import passing
from benchmarks.load import Load
from benchmarks.overhead import client_process, send_load, serving
from pruning.cli import progress_bars
from pruning.loading import EMBEDDED_MODEL
from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import Ended, FinishReason, Request, TokenEvent
from server.startup import Started, start

_VARIANT = "full"
_TOKENS = range(200, 1200)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a step takes."""

    launches: int
    """Operations that let the interpreter's lock go."""
    device_seconds: float


class PacedEngine:
    """The engine's verbs, where every request gets one token a step without any computing."""

    def __init__(self, engine: Engine, pace: Pace) -> None:
        self._engine = engine
        self._pace = pace
        self._requests: dict[str, Request] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._operand = torch.zeros(8)
        self._device_free = 0.0
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __getattr__(self, name: str) -> Any:
        """What is not about running is the engine's own."""
        return getattr(self._engine, name)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def submit(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._requests.update({request.id: request for request in requests})

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        with self._lock:
            if request := self._requests.pop(request_id, None):
                request.sink.put(Ended(reason, request.timeline(time.monotonic())))

    def _run(self) -> None:
        done = self._launch()
        while not self._stopping.is_set():
            next_done = self._launch()
            time.sleep(max(0.0, done - time.monotonic()))
            self._commit()
            done = next_done

    def _launch(self) -> float:
        """Return when the device will have computed the step."""
        for _ in range(self._pace.launches):
            self._operand.add_(1)
        self._device_free = max(self._device_free, time.monotonic()) + self._pace.device_seconds
        return self._device_free

    def _commit(self) -> None:
        self.steps += 1
        now = time.monotonic()
        with self._lock:
            for request in list(self._requests.values()):
                self._emit(request, now)

    def _emit(self, request: Request, now: float) -> None:
        request.first_token = request.first_token or now
        request.output.append(_TOKENS[len(request.output) % len(_TOKENS)])
        last = len(request.output) == request.params.max_tokens
        finish = FinishReason.LENGTH if last else None
        request.sink.put(TokenEvent(request.output[-1], None, now, finish))
        if last:
            del self._requests[request.id]
            request.sink.put(Ended(FinishReason.LENGTH, request.timeline(now)))


def main(
    streams: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 32,
    step_ms: Annotated[float, typer.Option(help="Of the device, a step.")] = 5.0,
    launches: Annotated[int, typer.Option(help="Operations that launch a step.")] = 100,
    output_tokens: Annotated[int, typer.Option(min=2)] = 256,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure what a streamed token costs HTTP's thread."""
    load = Load(2 * streams, streams, 8, output_tokens)
    settings = Settings.model_validate({"model": EMBEDDED_MODEL, "drop": "50%"})
    with progress_bars() as progress:
        started = passing(lambda: start(settings, progress))
    with client_process() as clients, _paced(started, Pace(launches, step_ms / 1000)) as served:
        runs = [served.run(clients, load) for _ in range(repeats + 1)][1:]
    _print(runs, streams)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the load."""

    http_cpu: float
    """Seconds of processor time of the thread that serves HTTP, for a token."""
    steps_per_second: float
    idle_steps_per_second: float
    """Without any requests."""


@dataclass(frozen=True, slots=True)
class _Paced:
    """A server whose engine is paced."""

    engine: PacedEngine
    url: str
    http_seconds: Callable[[], float]

    def run(self, clients: ProcessPoolExecutor, load: Load) -> Run:
        idle = self._pace(lambda: time.sleep(1))
        http = self.http_seconds()
        sent = self._pace(lambda: clients.submit(send_load, self.url, _VARIANT, load).result())
        tokens = load.requests * load.output_tokens
        return Run((self.http_seconds() - http) / tokens, sent, idle)

    def _pace(self, work: Callable[[], object]) -> float:
        """Return the steps a second while something is done."""
        steps, before = self.engine.steps, time.monotonic()
        work()
        return (self.engine.steps - steps) / (time.monotonic() - before)


@contextmanager
def _paced(started: Started, pace: Pace) -> Iterator[_Paced]:
    engine = PacedEngine(started.engine, pace)
    started.service.engine = cast("Engine", engine)
    with serving(started, engine) as (url, http_seconds):
        yield _Paced(engine, url, http_seconds)


def _print(runs: Sequence[Run], streams: int) -> None:
    table = Table(title=f"{streams} streams")
    for heading in ("HTTP's thread, µs a token", "steps/s without HTTP", "with", "less"):
        table.add_column(heading, justify="right")
    cpu = statistics.median(run.http_cpu for run in runs)
    idle = statistics.median(run.idle_steps_per_second for run in runs)
    busy = statistics.median(run.steps_per_second for run in runs)
    table.add_row(f"{cpu * 1e6:.1f}", f"{idle:.1f}", f"{busy:.1f}", f"{1 - busy / idle:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
