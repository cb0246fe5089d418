"""The in-process benchmarks' core on a tiny model: all rows are there, their figures fit together.

No figure is held against a time: what is tested is the bookkeeping.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.inprocess import DoesNotFitError, Running, decode, prefill, running, serve
from benchmarks.paper import Work
from benchmarks.paper import measure as measure_paper
from benchmarks.peers import PeerRun, bounded, continuous_batching, static_generate
from benchmarks.roofline import Ceilings
from benchmarks.shapes import (
    PRUNED,
    dropping,
    dropping_each,
    half_dropped,
    llama_config,
    random_base,
    random_model,
)
from benchmarks.step import MIXED, Load, Report, Sweep, limits_for, measure
from pruning.variants import FULL
from server.engine.assembly import EngineConfig

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 2e10, 1e11)
SWEEP = Sweep(
    batches=(1, 4),
    contexts=(96,),
    prefills=((2, 64),),
    steps=6,
    repeats=1,
    load=Load(4, 24, 6),
)


def config(requests: int, mebibytes: int = 16) -> EngineConfig:
    return EngineConfig(limits_for(requests, CPU, None), mebibytes << 20)


@pytest.fixture(scope="module")
def report() -> Report:
    base = random_base("tiny", torch.float32, CPU)
    return measure(base, half_dropped(base.layers), config(4), SWEEP, CEILINGS)


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    """A pool of 4 requests of 100 tokens by full, and of 8 by pruned."""
    base = random_base("tiny", torch.float32, CPU)
    pages = EngineConfig(limits_for(8, CPU, None), 4 * 112 * 4 * 2 * 2 * 16 * 4)
    with running(base, half_dropped(base.layers), pages) as started:
        yield started


def test_every_cell_is_measured_once(report: Report) -> None:
    measured = sorted((row.what, row.batch) for row in report.decode)
    alone = [(what, batch) for what in (FULL, PRUNED) for batch in (1, 2, 4)]
    assert measured == sorted([*alone, (MIXED, 4)])
    assert [(row.what, row.batch) for row in report.prefill] == [(FULL, 2), (PRUNED, 2)]
    assert report.skipped == ()


def test_decode_figures_fit_together(report: Report) -> None:
    for row in report.decode:
        assert row.ratio == pytest.approx(row.seconds / row.roofline_seconds)
        assert row.ratio_by_read >= row.ratio  # the read ceiling given here is the higher one
        assert row.tokens_per_second == pytest.approx(row.batch / row.seconds)
        assert row.mean_context == pytest.approx(96, abs=12)
        assert row.idle_share is None  # a CPU's is not measured
        assert row.first_token_seconds > 0


def test_comparisons_are_with_the_rows_beside(report: Report) -> None:
    rows = {(row.what, row.batch): row for row in report.decode}
    full, pruned, mixed = (rows[what, 4] for what in (FULL, PRUNED, MIXED))
    assert pruned.over_full == pytest.approx(full.seconds / pruned.seconds)
    assert full.over_separate is None
    apart = rows[FULL, 2].seconds + rows[PRUNED, 2].seconds
    assert mixed.over_separate == pytest.approx(apart / mixed.seconds)
    assert pruned.bytes < mixed.bytes < full.bytes
    assert pruned.kv_bytes == pytest.approx(full.kv_bytes / 2, rel=0.3)  # a page more or less
    for row in report.prefill:
        assert row.ratio == pytest.approx(row.seconds / row.roofline_seconds)


def test_eight_bits_move_and_keep_fewer_bytes(report: Report) -> None:
    base = random_base("tiny", torch.float32, CPU)
    eight_bits = replace(config(4), kv_cache_dtype="fp8")
    got = measure(base, half_dropped(base.layers), eight_bits, SWEEP, CEILINGS)
    for narrow, wide in zip(got.decode, report.decode, strict=True):
        assert (narrow.what, narrow.batch) == (wide.what, wide.batch)
        assert narrow.bytes < wide.bytes
        assert narrow.kv_bytes < wide.kv_bytes / 3  # a quarter, but for a page more or less


def test_the_load_is_served_by_both_variants(report: Report) -> None:
    assert [run.who for run in report.served] == ["attndrop full", "attndrop pruned"]
    assert all(run.tokens_per_second and run.step_seconds for run in report.served)


def test_what_does_not_fit_is_skipped_and_told() -> None:
    base = random_base("tiny", torch.float32, CPU)
    sweep = Sweep(batches=(2, 64), contexts=(512,), steps=4, repeats=1)
    got = measure(base, half_dropped(base.layers), config(64, 2), sweep, CEILINGS)
    assert {row.batch for row in got.decode} == {1, 2}
    assert any("full, batch 64" in reason and "page pools" in reason for reason in got.skipped)


def test_a_window_is_timed_in_full_and_contexts_are_those_of_the_window(engine: Running) -> None:
    got = decode(engine, {FULL: 2, PRUNED: 1}, context=64, steps=8)
    assert set(got.contexts) == {FULL, PRUNED}
    assert statistics.mean(got.contexts.values()) == pytest.approx(64, abs=8)
    assert 0 < got.step_seconds < got.first_token_seconds * 100
    assert got.kv_bytes > 0
    assert all(v.running == v.waiting == 0 for v in engine.engine.stats().variants)


def test_a_pool_that_is_too_small_is_said_before_anything_runs(engine: Running) -> None:
    steps = engine.engine.stats().steps
    with pytest.raises(DoesNotFitError, match="page pools"):
        decode(engine, {FULL: 8}, context=96, steps=4)
    with pytest.raises(DoesNotFitError, match="9 requests where 8 run at most"):
        prefill(engine, {PRUNED: 9}, prompt=4)
    assert engine.engine.stats().steps == steps


def test_a_load_keeps_as_many_in_flight_as_told(engine: Running) -> None:
    got = serve(engine, PRUNED, requests=5, prompt=20, output=4, in_flight=2)
    assert got.output_tokens == 20
    assert got.preemptions == 0
    assert got.tokens_per_second == pytest.approx(20 / got.seconds)


def test_pruned_drops_from_the_end_and_never_layer_0() -> None:
    assert dropping(8, 3)[PRUNED].dropped(8) == (5, 6, 7)
    assert dropping(8, 7)[PRUNED].dropped(8) == (1, 2, 3, 4, 5, 6, 7)
    assert half_dropped(5)[PRUNED].dropped(5) == (3, 4)
    assert len(dropping_each(8, {"a": 2, "b": 4})) == 3
    with pytest.raises(ValueError, match="drop 0 to 7"):
        dropping(8, 8)


def test_unknown_shapes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="llama-3-8b"):
        llama_config("llama-9-1t")
    with pytest.raises(ValueError, match="give 1 to 4"):
        llama_config("tiny", layers=5)


def test_a_shape_has_the_same_weights_every_time() -> None:
    first, second = (random_model("tiny", torch.float32, CPU) for _ in range(2))
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_peers_run_and_a_failing_one_is_told() -> None:
    model = random_model("tiny", torch.float32, CPU)
    prompts = [list(range(start, start + 12)) for start in range(2)]
    assert (static_generate(model, prompts, 5).tokens_per_second or 0) > 0
    assert (continuous_batching(model, prompts, prompts, 5).tokens_per_second or 0) > 0
    refused = bounded("peer", 60, _refuses, "no kernels\nand a long trace")
    assert refused == PeerRun("peer", error="RuntimeError: no kernels")
    assert bounded("peer", 0.01, _refuses, "late").error == "not done after 0.01 s"
    assert bounded("peer", 60, sys.exit, 3).error == "its process ended with exit code 3"


def _refuses(why: str) -> PeerRun:
    raise RuntimeError(why)


@pytest.mark.parametrize(("binding", "in_flight"), [(False, 4), (True, 8)])
def test_the_papers_setting_runs_each_variant_at_its_batch(binding: bool, in_flight: int) -> None:
    base = random_base("tiny", torch.float32, CPU)
    pool = EngineConfig(limits_for(16, CPU, None), 4 * 96 * 4 * 2 * 2 * 16 * 4)
    work = Work(prompt=88, generated=8, batch=None, requests=None, binding=binding)
    full, pruned = measure_paper(base, half_dropped(base.layers), pool, work, CEILINGS)
    assert (full.dropped, full.in_flight, full.speed_up, full.kv_of_full) == (0, 4, 1, 1)
    assert (pruned.dropped, pruned.in_flight) == (2, in_flight)
    assert full.requests == pruned.requests == (16 if binding else 4)
    assert full.preemptions == pruned.preemptions == 0
    assert pruned.speed_up == pytest.approx(pruned.tokens_per_second / full.tokens_per_second)
    assert pruned.roofline_speed_up > 1
    assert pruned.printed is None  # the paper has no such shape


def test_a_batch_that_the_pool_does_not_hold_is_refused() -> None:
    base = random_base("tiny", torch.float32, CPU)
    work = Work(prompt=88, generated=8, batch=64, requests=None, binding=False)
    with pytest.raises(DoesNotFitError, match="64 requests of 96 tokens by full"):
        measure_paper(base, half_dropped(base.layers), config(64, 1), work, CEILINGS)
