"""What HTTP costs: one engine, the same load given to it in this process and over HTTP, as streams.

    python -m benchmarks.overhead --streams 32 --repeats 3

One process holds the engine and the server, as `attndrop serve` does; the clients are a process of
their own. Three figures, since none says everything:

whole runs    of both kinds, in pairs, each kind first in every other pair: arrivals and ends are
              part of them, but two runs in a row may differ by more than HTTP costs
neighbours    of steps within one run over HTTP, whose tokens are handed on or kept (gate.py): what
              streams cost while nothing comes or goes
all cores'    time that HTTP's thread and the clients take: on a machine with as many cores as the
              engine has threads, any server would lose that much to them

Tokens a step say how well the requests ran together, the device's idle share whether it waited for
the host between steps (on a GPU; a CPU's is not counted).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gate import Gate, GatedEngine, comparisons, median_between
from benchmarks.inprocess import Running, machine, passing
from benchmarks.inprocess import serve as serve_in_process
from benchmarks.load import Load, no_kv_bytes, ours, sent
from pruning.cli import progress_bars
from pruning.loading import EMBEDDED_MODEL
from server.api.service import Service
from server.config import Settings
from server.engine.assembly import default_limits
from server.engine.engine import Engine
from server.engine.stats import EngineStats
from server.lifecycle import Server, Worker, bind
from server.startup import Started, start

BAR = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the load."""

    tokens_per_second: float
    process_cpu: float
    """Seconds of processor time that the engine's process spent on a token."""
    http_cpu: float = 0.0
    """Of those, the thread's that serves HTTP."""
    client_cpu: float = 0.0
    """Seconds of processor time that the clients' process spent on a token."""
    step_tokens: float = 0.0
    """Generated tokens over the engine's steps."""
    idle_share: float = 0.0
    """Of the device's time in steps and between those that followed each other."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Runs of both kinds in pairs, and steps of the same run."""

    streams: int
    cores: int
    pairs: tuple[tuple[Run, Run], ...]
    """In process, over HTTP."""
    longer_steps: tuple[float, ...]
    """By what share steps take longer for their tokens' being handed on, once a comparison."""

    @property
    def in_process(self) -> Run:
        return _median([inside for inside, _ in self.pairs])

    @property
    def over_http(self) -> Run:
        return _median([over for _, over in self.pairs])

    @property
    def shares(self) -> list[float]:
        """Of the speed in process, what is lost over HTTP, from the least to the most."""
        return sorted(
            1 - over.tokens_per_second / inside.tokens_per_second for inside, over in self.pairs
        )

    @property
    def cpu_share(self) -> float:
        """Processor time of the thread that serves HTTP over what a token takes in process."""
        return self.over_http.http_cpu / self.in_process.process_cpu

    @property
    def cores_share(self) -> float:
        """Of all cores' time, what HTTP's thread and the clients take."""
        over = self.over_http
        return (over.http_cpu + over.client_cpu) * over.tokens_per_second / self.cores


def main(
    model: Annotated[str, typer.Option(help="What to serve.")] = EMBEDDED_MODEL,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "50%",
    variant: Annotated[str, typer.Option(help="Which variant is measured.")] = "full",
    streams: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 32,
    requests: Annotated[int, typer.Option(min=1, help="A run, for each one in flight.")] = 2,
    prompt_tokens: int = 64,
    output_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs, and runs of steps.")] = 3,
    steady_tokens: Annotated[
        int, typer.Option(min=2, help="Generated tokens of a request while steps are compared.")
    ] = 256,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure what HTTP costs."""
    load = Load(requests * streams, streams, prompt_tokens, output_tokens)
    steady = Load(streams, streams, prompt_tokens, steady_tokens)
    settings = Settings.model_validate({"model": model, "drop": drop, "prefix_caching": False})
    with client_process() as clients, _served(settings) as served:
        pairs = _pairs(served, clients, variant, load, repeats)
        longer = _longer_steps(served, clients, variant, steady, repeats)
    found = Overhead(streams, len(os.sched_getaffinity(0)), tuple(pairs), tuple(longer))
    _print(found, load, served.device)
    if output is not None:
        shares = {"cpu_share": found.cpu_share, "cores_share": found.cores_share}
        body = {"machine": machine(served.device), **asdict(found), **shares}
        output.write_text(json.dumps(body, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class _Served:
    """A running engine and the server in front of it."""

    running: Running
    service: Service
    device: torch.device
    url: str
    http_seconds: Callable[[], float]
    """The processor time that serving HTTP has taken."""


@contextmanager
def client_process() -> Iterator[ProcessPoolExecutor]:
    """Start the process that the clients are in."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
        yield clients


@contextmanager
def _served(settings: Settings) -> Iterator[_Served]:
    """Start an engine and the server in front of it, in this process, and stop them after."""
    before = time.monotonic()
    with progress_bars() as progress:
        started = passing(lambda: start(settings, progress))
    seconds = time.monotonic() - before
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary, limits = started.service.vocabulary_size, default_limits(device)
    with serving(started, started.engine) as (url, http_seconds):
        running = Running(started.engine, vocabulary, limits, seconds)
        yield _Served(running, started.service, device, url, http_seconds)


@contextmanager
def serving(started: Started, worker: Worker) -> Iterator[tuple[str, Callable[[], float]]]:
    """Serve HTTP on a thread of its own; yield its URL and what tells the thread's seconds of
    processor time so far."""
    address = bind("127.0.0.1", 0)
    up: SimpleQueue[str] = SimpleQueue()
    server = Server(started.app, started.service, worker, drain_timeout=1, when_up=up.put)
    thread = threading.Thread(target=server.run, args=([address],), name="http")
    thread.start()
    try:
        url = up.get(timeout=60)
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        yield url, lambda: time.clock_gettime(clock)
    finally:
        server.should_exit = True
        thread.join()


def _pairs(
    served: _Served, clients: ProcessPoolExecutor, variant: str, load: Load, repeats: int
) -> list[tuple[Run, Run]]:
    """Run both kinds in turns, each first in every other pair; the first pair, a warm-up, is left
    out."""
    pairs = []
    for pair in range(repeats + 1):
        if pair % 2:
            over = _over_http(served, clients, variant, load)
            inside = _in_process(served.running, variant, load)
        else:
            inside = _in_process(served.running, variant, load)
            over = _over_http(served, clients, variant, load)
        pairs.append((inside, over))
    return pairs[1:]


def _longer_steps(
    served: _Served, clients: ProcessPoolExecutor, variant: str, load: Load, repeats: int
) -> list[float]:
    """Compare steps whose tokens are handed on with those whose are kept."""
    found = []
    for _ in range(repeats):
        gate = Gate()
        served.service.engine = cast("Engine", GatedEngine(served.running.engine, gate))
        clients.submit(send_load, served.url, variant, load).result()
        found += comparisons(gate.steps, load.concurrency)
    served.service.engine = served.running.engine
    return found


def _in_process(running: Running, variant: str, load: Load) -> Run:
    before, stats = time.process_time(), running.engine.stats()
    served = serve_in_process(
        running, variant, load.requests, load.prompt_tokens, load.output_tokens, load.concurrency
    )
    spent = time.process_time() - before
    run = Run(served.tokens_per_second, spent / served.output_tokens)
    return _with_steps(run, served.output_tokens, stats, running.engine.stats())


def _over_http(served: _Served, clients: ProcessPoolExecutor, variant: str, load: Load) -> Run:
    process, http = time.process_time(), served.http_seconds()
    stats = served.running.engine.stats()
    speed, client = clients.submit(send_load, served.url, variant, load).result()
    tokens = load.requests * load.output_tokens
    run = Run(
        speed,
        (time.process_time() - process) / tokens,
        (served.http_seconds() - http) / tokens,
        client / tokens,
    )
    return _with_steps(run, tokens, stats, served.running.engine.stats())


def _with_steps(run: Run, tokens: int, before: EngineStats, after: EngineStats) -> Run:
    """Add what the engine says of a run of so many tokens."""
    idle = after.device_idle_seconds - before.device_idle_seconds
    whole = idle + after.device_busy_seconds - before.device_busy_seconds
    return replace(
        run,
        step_tokens=tokens / (after.steps - before.steps),
        idle_share=idle / whole if whole else 0.0,
    )


def send_load(url: str, variant: str, load: Load) -> tuple[float, float]:
    """Send a load; return tokens a second and the seconds of processor time that it took here."""
    before = time.process_time()
    endpoint = replace(ours(url, variant), kv_bytes=no_kv_bytes)  # a scrape is no part of serving
    measured = sent(endpoint, load)
    return measured.tokens_per_second, time.process_time() - before


def _median(runs: Sequence[Run]) -> Run:
    columns = zip(*map(astuple, runs), strict=True)
    return Run(*(statistics.median(column) for column in columns))


def _print(found: Overhead, load: Load, device: torch.device) -> None:
    title = (
        f"{load.concurrency} streams, {load.prompt_tokens} prompt and {load.output_tokens} "
        f"generated tokens a request; bar: {BAR:.0%}"
    )
    table = Table(title=title)
    cpu = ("CPU µs a token", "of it HTTP's thread", "clients' beside it")
    for heading in ("", "tokens/s", *cpu, "tokens a step", "device idle"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, run in (("in process", found.in_process), ("over HTTP", found.over_http)):
        seconds = (run.process_cpu, run.http_cpu, run.client_cpu)
        cells = (f"{value * 1e6:.0f}" for value in seconds)
        idle = "-" if device.type == "cpu" else f"{run.idle_share:.1%}"
        steps = (f"{run.step_tokens:.1f}", idle)
        table.add_row(name, f"{run.tokens_per_second:.1f}", *cells, *steps)
    share = statistics.median(found.shares)
    overhead = f"{share:.1%}{_mark(share)}"
    table.add_row("overhead", overhead, "", f"{found.cpu_share:.1%}", "")
    console = Console(width=120)
    console.print(table)
    console.print(
        f"pairs of whole runs: {found.shares[0]:.1%} to {found.shares[-1]:.1%}\n"
        f"{_steps(found.longer_steps)}\n"
        f"HTTP's thread and the clients take {found.cores_share:.1%} of {found.cores} cores' time"
    )


def _steps(longer: Sequence[float]) -> str:
    """Say what comparisons of steps show."""
    if not longer:
        return "no steps could be compared: --steady-tokens ends before all streams have begun"
    share, (low, high) = statistics.median(longer), median_between(longer)
    return (
        f"a step takes {share:.1%}{_mark(share)} longer where tokens are handed on "
        f"({low:.1%} to {high:.1%}, {len(longer)} comparisons)"
    )


def _mark(share: float) -> str:
    return "" if share <= BAR else " !"


if __name__ == "__main__":
    typer.run(main)
