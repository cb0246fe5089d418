"""The growth benchmark's bookkeeping on a tiny model, and its plot. No figure is held against a
time."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.growth import HostClock, Row, measure, panels, request_bytes
from benchmarks.growth_plot import growth_plot
from benchmarks.inprocess import Running, running
from benchmarks.shapes import half_dropped, random_base
from server.engine.assembly import EngineConfig
from server.engine.scheduler import Limits

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    base = random_base("tiny", torch.float32, torch.device("cpu"))
    limits = Limits(tokens_per_step=64, running=2, waiting=100)
    with running(base, half_dropped(base.layers), EngineConfig(limits, 32 << 20)) as started:
        yield started


def test_steps_are_timed_while_requests_wait(engine: Running) -> None:
    row = measure(engine, "queue", 2, 8, 40, 4)
    assert (row.running, row.context, row.queued) == (2, 8, 40)
    assert row.host > 0
    assert row.step > 0
    assert not any(stats.waiting or stats.running for stats in engine.engine.stats().variants)


def test_no_queue_has_no_memory(engine: Running) -> None:
    assert request_bytes(engine, 2, 0) == 0.0
    assert request_bytes(engine, 2, 40) >= 0.0


def test_the_host_clock_counts_nothing_twice() -> None:
    clock = HostClock()
    inner = clock.around(lambda: sum(range(20_000)))
    outer = clock.around(lambda: (inner(), inner()), step=True)
    outer()
    once = clock.seconds
    assert clock.steps == 1
    inner()
    assert clock.steps == 1
    assert clock.seconds > once


def test_the_plot_is_an_svg_of_every_point() -> None:
    rows = [Row("queue", 8, 64, queued, 0.02, 1e-4) for queued in (0, 100, 10_000)]
    rows += [Row("batch", size, 64, 0, 0.01 * size, 1e-4 * size) for size in (1, 1000)]
    assert [panel.title for panel in panels(rows)] == ["batch grows", "queue grows"]
    drawing = ElementTree.fromstring(growth_plot(panels(rows), "ms"))
    assert drawing.tag == f"{SVG}svg"
    assert len(list(drawing.iter(f"{SVG}circle"))) == 2 * len(rows)
    assert len(list(drawing.iter(f"{SVG}path"))) == 4
