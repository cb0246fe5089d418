"""A gate behind an engine: tokens are handed on in some steps and kept in as many, in turns.

Two runs of one load, one after the other, differ by several per cent on a machine that others use
too, whatever is served. Neighbouring steps of one run do not, so what it costs to hand tokens on
shows in how much longer those steps take after which it happens::

    step       0 1 2 3   4 5 6 7   8 9 10 11   12 13 14 15   16 ...
    tokens     on        kept      kept        on            on ...
               `------------- one comparison -------------'

Both kinds are early and late alike, so that growing contexts cancel out. Of every quarter the first
step is left out: what was handed on before it may still be under way. What was kept is handed on
when the first request ends.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from server.engine.engine import Engine
from server.engine.request import Event, Request, Sink, TokenEvent

QUARTER = 4
"""Steps, of which a comparison has four times as many."""


@dataclass(slots=True)
class Step:
    """One that brought tokens."""

    time: float
    """When they were there."""
    tokens: int = 0


class Gate:
    """What is between an engine and its requests' sinks. Used on the engine's thread."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._kept: list[tuple[Sink, Event]] = []

    def put(self, sink: Sink, event: Event) -> None:
        """Hand an event on or keep it. Before one that ends a request, all others are handed on."""
        if isinstance(event, TokenEvent):
            self._count(event.time)
            if event.finish is None and is_kept(len(self.steps) - 1):
                self._kept.append((sink, event))
                return
        if not isinstance(event, TokenEvent) or event.finish is not None:
            self._open()
        sink.put(event)

    def _open(self) -> None:
        for sink, event in self._kept:
            sink.put(event)
        self._kept.clear()

    def _count(self, time: float) -> None:
        if not self.steps or self.steps[-1].time != time:
            self.steps.append(Step(time))
        self.steps[-1].tokens += 1


def is_kept(step: int) -> bool:
    """Whether the gate keeps what a step brings."""
    return step // QUARTER % 4 in (1, 2)


class GatedEngine:
    """An engine whose events pass a gate."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self._engine = engine
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        """What is not about submitting is the engine's own."""
        return getattr(self._engine, name)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.sink = _GatedSink(self._gate, request.sink)
        self._engine.submit(requests)


@dataclass(frozen=True, slots=True)
class _GatedSink:
    """Where the engine puts one request's events."""

    gate: Gate
    sink: Sink

    def put(self, event: Event) -> None:
        self.gate.put(self.sink, event)


def comparisons(steps: Sequence[Step], streams: int) -> list[float]:
    """Return by what share a step takes longer after one whose tokens were handed on, once for
    each comparison in which every step brought every stream a token."""
    found: dict[int, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for index, (step, following) in enumerate(pairwise(steps)):
        if index % QUARTER and step.tokens == following.tokens == streams:
            seconds = following.time - step.time
            found[index // (4 * QUARTER)][is_kept(index)].append(seconds)
    whole = 2 * (QUARTER - 1)
    return [
        statistics.mean(taken[False]) / statistics.mean(taken[True]) - 1
        for taken in found.values()
        if len(taken[False]) == len(taken[True]) == whole
    ]


def median_between(values: Sequence[float]) -> tuple[float, float]:
    """Return what the median of what values are drawn from lies between, 19 times in 20, however
    they are distributed: as many are above it as coins show heads."""
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(len(ordered))  # 1.96 standard deviations of that number
    first = max(0, math.floor(len(ordered) / 2 - reach))
    return ordered[first], ordered[len(ordered) - 1 - first]
