"""The benchmark of shared beginnings, against a live server: its stages are all of the time."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.prefix import _measure, _stages
from tests.live import LiveServer


def test_a_second_request_finds_the_beginning_and_its_stages_are_all_of_its_time(
    live: LiveServer,
) -> None:
    (row,) = asyncio.run(_measure(live.url, ["pruned"], shared=96, own=8, repeats=1))
    assert row.cached_tokens >= 48
    stages = row.stages
    assert min(stages.outside, stages.queue, stages.host) > 0
    assert stages.device >= 0
    total = stages.outside + stages.queue + stages.host + stages.device
    assert total == pytest.approx(row.second)


def test_stages_are_what_one_request_added() -> None:
    def metrics(queue: float, prefill: float, busy: float) -> str:
        return (
            "\n".join(
                f'attndrop_{name}{{model_name="m",variant="{variant}"}} {seconds}'
                for name, seconds in (
                    ("queue_time_seconds_sum", queue),
                    ("prefill_time_seconds_sum", prefill),
                )
                for variant in ("full", "pruned")
            )
            + f'\nattndrop_device_busy_seconds_total{{model_name="m"}} {busy}'
        )

    stages = _stages(metrics(1.0, 2.0, 3.0), metrics(1.5, 4.0, 4.25), "pruned", 3.0)
    assert (stages.outside, stages.queue, stages.host, stages.device) == (0.5, 0.5, 0.75, 1.25)
