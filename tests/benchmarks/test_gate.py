"""What the gate keeps and hands on, and what is made of the steps' times. No time is measured."""

from __future__ import annotations

import math

import pytest

from benchmarks.gate import QUARTER, Gate, GatedEngine, Step, comparisons, is_kept, median_between
from server.engine.request import Ended, Event, FinishReason, TokenEvent
from server.engine.stats import Timeline

TIMELINE = Timeline(0.0, 1.0, 2.0, 3.0)
COMPARISON = 4 * QUARTER


class Recorded:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.tokens.append(event.token)
        else:
            self.ended = True


def steps_of(seconds: list[float], streams: int = 2) -> list[Step]:
    """Return steps of so many tokens, each so long after the one before."""
    times = [sum(seconds[:count]) for count in range(len(seconds) + 1)]
    return [Step(time, streams) for time in times]


def test_tokens_of_some_steps_are_kept_until_a_request_ends() -> None:
    gate, one, other = Gate(), Recorded(), Recorded()
    for step in range(2 * QUARTER):
        gate.put(one, TokenEvent(step, None, float(step)))
        gate.put(other, TokenEvent(step, None, float(step)))
    handed_on = [step for step in range(2 * QUARTER) if not is_kept(step)]
    assert one.tokens == other.tokens == handed_on
    gate.put(one, TokenEvent(99, None, 99.0, FinishReason.LENGTH))
    assert sorted(one.tokens) == [*range(2 * QUARTER), 99]
    assert one.tokens[-1] == 99
    assert sorted(other.tokens) == [*range(2 * QUARTER)]
    assert [step.tokens for step in gate.steps] == [2] * 2 * QUARTER + [1]


def test_an_end_without_a_last_token_finds_nothing_kept() -> None:
    gate, sink = Gate(), Recorded()
    for step in range(2 * QUARTER):
        gate.put(sink, TokenEvent(step, None, float(step)))
    gate.put(sink, Ended(FinishReason.ABORT, TIMELINE))
    assert sink.ended
    assert len(sink.tokens) == 2 * QUARTER


def test_what_handing_on_costs_is_found_while_steps_grow_longer() -> None:
    cost = 0.1
    seconds = [
        (1 + step / 1000) * (1.0 if is_kept(step) else 1 + cost) for step in range(3 * COMPARISON)
    ]
    assert comparisons(steps_of(seconds), 2) == pytest.approx([cost] * 3, rel=0.01)


def test_work_that_is_left_over_is_charged_to_neither() -> None:
    def late(step: int) -> float:
        return 0.0 if step == 0 or is_kept(step - 1) == is_kept(step) else 5.0

    seconds = [1.0 + late(step) for step in range(COMPARISON)]
    assert comparisons(steps_of(seconds), 2) == [0.0]


def test_steps_that_do_not_bring_every_stream_a_token_are_not_compared() -> None:
    steps = steps_of([1.0] * 2 * COMPARISON)
    steps[QUARTER + 1].tokens = 1
    assert comparisons(steps, 2) == [0.0]
    assert comparisons(steps, 3) == []


def test_a_gated_engine_is_the_engine_otherwise() -> None:
    class Other:
        context = 5

    assert GatedEngine(Other(), Gate()).context == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [6, 20, 43, 200])
def test_the_median_is_between_19_times_in_20(count: int) -> None:
    low, _ = median_between([float(value) for value in range(count)])
    # Each value is above the median as a coin shows heads: the median is below `low` if at most
    # `low` values are below it.
    missed = 2 * sum(math.comb(count, below) for below in range(int(low) + 1)) / 2**count
    assert 0.02 <= missed <= 0.075
    assert median_between(list(range(count)))[1] == count - 1 - low
