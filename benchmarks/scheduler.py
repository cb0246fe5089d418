"""What choosing and laying out a step costs on the host, as requests pile up. No model, no device.

    python -m benchmarks.scheduler --running 1,10,100,1000 --queued 0,10000

Every running request decodes, half of them `full`, half `pruned`; the queue is full of requests
that cannot be admitted. The ceiling is the step itself: a share of 2 % of --step-ms is marked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from pruning.variants import FULL, Variant, Variants
from server.engine.batch import build_batch
from server.engine.pages import PagePool, page_layout
from server.engine.request import Event, Request, SamplingParams
from server.engine.scheduler import Limits, Scheduled, Scheduler

LAYERS = 30
DROPPED = 8
STEPS = 64
"""Steps timed together: enough for every request to need a page of each group."""
SHARE = 0.02
"""Of a step's time that the host may take."""


@dataclass(frozen=True, slots=True)
class Row:
    """Means of the quietest of several windows, in microseconds."""

    running: int
    queued: int
    schedule: float
    batch: float
    advance: float
    remove_queued: float

    @property
    def step(self) -> float:
        return self.schedule + self.batch + self.advance


class _Silence:
    """The sink of requests whose tokens nobody reads."""

    def put(self, event: Event) -> None:
        del event


class _Crowd:
    """Requests that all decode, and others that wait."""

    def __init__(self, running: int, queued: int, context: int) -> None:
        every = frozenset(range(LAYERS))
        kept = every - frozenset(range(LAYERS - DROPPED, LAYERS))
        self.variants = Variants(LAYERS, [Variant(FULL, every), Variant("pruned", kept)])
        self.layout = page_layout([len(group.layers) for group in self.variants.groups], 1)
        tokens = context + 16 * STEPS
        pages = sum(self.layout.pages_for(tokens, group) for group in (0, 1)) * running
        limits = Limits(running * context, running=running, waiting=queued)
        self.scheduler = Scheduler(limits, self.variants, self.layout, PagePool(pages))
        self.waiting = [self._request(context, f"waiting {i}") for i in range(queued)]
        for index in range(running):
            self.scheduler.add(self._request(context, f"{index}", (FULL, "pruned")[index % 2]))
        for request in self.waiting:
            self.scheduler.add(request)
        step = self.scheduler.schedule()
        self.scheduler.advance(step)
        self.commit(step)

    def _request(self, context: int, name: str, variant: str = FULL) -> Request:
        prompt = tuple(hash((name, place)) % 50_000 for place in range(context))
        return Request(name, prompt, variant, SamplingParams(10**6), _Silence(), 0.0)

    def commit(self, step: Sequence[Scheduled]) -> None:
        """Read the tokens of the step before, as where one step is always in flight."""
        for place, scheduled in enumerate(step):
            request = scheduled.request
            if request.pending is not None:
                request.output.append(7)
            request.pending = place


def main(
    running: Annotated[str, typer.Option(help="Requests that decode.")] = "1,10,100,1000",
    queued: Annotated[str, typer.Option(help="Requests that wait.")] = "0,10000",
    context: Annotated[int, typer.Option(help="Prompt tokens of each.")] = 512,
    step_ms: Annotated[float, typer.Option(help="The step this is a share of.")] = 20.0,
    repeats: int = 3,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the scheduler and the layout of batches."""
    rows = [
        _measure(int(running_), int(queued_), context, repeats)
        for queued_ in queued.split(",")
        for running_ in running.split(",")
    ]
    _print(rows, step_ms)
    if output is not None:
        body = {"context": context, "rows": [{**asdict(row), "step": row.step} for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


def _measure(running: int, queued: int, context: int, repeats: int) -> Row:
    crowd = _Crowd(running, queued, context)
    windows = [_window(crowd) for _ in range(repeats)]
    schedule, batch, advance = min(windows, key=sum)
    return Row(running, queued, schedule, batch, advance, _remove_queued(crowd))


def _window(crowd: _Crowd) -> tuple[float, float, float]:
    """Return the mean microseconds of schedule, build_batch and advance over a window of steps."""
    spent = [0.0, 0.0, 0.0]
    for _ in range(STEPS):
        step, schedule = _timed(crowd.scheduler.schedule)
        _, batch = _timed(lambda step=step: build_batch(step, crowd.variants, crowd.layout))  # type: ignore[misc]
        _, advance = _timed(lambda step=step: crowd.scheduler.advance(step))  # type: ignore[misc]
        crowd.commit(step)
        spent = [spent[0] + schedule, spent[1] + batch, spent[2] + advance]
    return spent[0] / STEPS, spent[1] / STEPS, spent[2] / STEPS


def _remove_queued(crowd: _Crowd) -> float:
    """Return the mean microseconds it takes to forget a request that waits, anywhere in the
    queue."""
    leaving = crowd.waiting[::100]

    def remove() -> None:
        for request in leaving:
            crowd.scheduler.remove(request)

    return _timed(remove)[1] / len(leaving) if leaving else 0.0


Result = TypeVar("Result")


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Return what `work` returns and the microseconds it took."""
    start = time.perf_counter()
    result = work()
    return result, (time.perf_counter() - start) * 1e6


def _print(rows: Sequence[Row], step_ms: float) -> None:
    table = Table(title=f"Microseconds a step; bar: {SHARE:.0%} of a step of {step_ms:g} ms")
    headings = ("running", "queued", "schedule", "build_batch", "advance", "together")
    for heading in (*headings, "a request", "of the step", "remove a queued one"):
        table.add_column(heading, justify="right")
    for row in rows:
        share = row.step / (step_ms * 1e3)
        table.add_row(
            f"{row.running:,}",
            f"{row.queued:,}",
            f"{row.schedule:.1f}",
            f"{row.batch:.1f}",
            f"{row.advance:.1f}",
            f"{row.step:.1f}",
            f"{row.step / row.running:.2f}",
            f"{share:.2%}" + ("" if share <= SHARE else " !"),
            f"{row.remove_queued:.2f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
