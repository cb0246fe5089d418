"""Metrics, read back through the exposition that Prometheus would scrape."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from server.engine.stats import EngineStats, Timeline, VariantInfo, VariantStats
from server.evidence import Evidence, MeasuredQuality
from server.metrics import FINISH_REASONS, REFUSAL_REASONS, Metrics

FULL = VariantInfo("full", 30, (), kv_bytes_per_token=23_040, capacity_tokens=4_000)
PRUNED = VariantInfo(
    "pruned", 15, tuple(range(15)), kv_bytes_per_token=11_520, capacity_tokens=8_000
)


def _idle(variant: str) -> VariantStats:
    return VariantStats(
        variant,
        running=0,
        waiting=0,
        kv_bytes=0,
        preemptions=0,
        cached_bytes=0,
        prefix_asked_tokens=0,
        prefix_hit_tokens=0,
    )


IDLE = EngineStats(
    alive=True,
    pool_bytes=1_000,
    variants=(_idle("full"), _idle("pruned")),
    steps=0,
    device_busy_seconds=0.0,
    device_idle_seconds=0.0,
)
BUSY = EngineStats(
    alive=True,
    pool_bytes=1_000,
    variants=(
        VariantStats("full", 2, 1, 500, 3, 100, prefix_asked_tokens=80, prefix_hit_tokens=60),
        VariantStats("pruned", 4, 0, 250, 0, 0, 0, 0),
    ),
    steps=77,
    device_busy_seconds=40.0,
    device_idle_seconds=2.5,
)
WHOLE = Timeline(arrived=10.0, first_scheduled=10.5, first_token=12.0, finished=15.0)

EVIDENCE = {
    "full": Evidence(None, 0, 0),
    "pruned": Evidence(MeasuredQuality(0.25, 0.8, 12.0, 1.2, tokens=1_016), 1_024, 4_096),
}
PLAN = {"plan_id": "abc123", "strategy": "greedy", "substitutes": "linear", "budget": "none"}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def build(stats: Callable[[], EngineStats] = lambda: IDLE) -> Metrics:
    return Metrics("smol", (FULL, PRUNED), EVIDENCE, PLAN, version="0.1.0", stats=stats)


def samples(metrics: Metrics) -> Samples:
    body, _ = metrics.render()
    return by_labels(parse_text(body.decode()))


def by_labels(families: Iterable[Metric]) -> Samples:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in families
        for s in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"attndrop_{name}", frozenset({"model_name": "smol", **labels}.items())


def without_created_and_process(seen: Samples) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {k for k in seen if k[0].startswith("attndrop_") and not k[0].endswith("_created")}


def test_every_series_exists_from_the_start_and_no_other_appears() -> None:
    metrics = build()
    before = samples(metrics)
    for variant in ("full", "pruned"):
        metrics.token_emitted(variant, 0.01)
        for reason in FINISH_REASONS:
            metrics.finished(variant, reason, 5, 7, WHOLE)
    for reason in REFUSAL_REASONS:
        metrics.refused(reason)
    assert without_created_and_process(samples(metrics)) == without_created_and_process(before)
    assert before[key("generated_tokens_total", variant="pruned")] == 0
    assert before[key("requests_finished_total", variant="full", finish_reason="error")] == 0


def test_a_finished_request_is_counted_in_its_variant_only() -> None:
    metrics = build()
    metrics.finished("pruned", "stop", prompt_tokens=100, generated_tokens=20, timeline=WHOLE)
    seen = samples(metrics)
    assert seen[key("requests_finished_total", variant="pruned", finish_reason="stop")] == 1
    assert seen[key("requests_finished_total", variant="full", finish_reason="stop")] == 0
    assert seen[key("prompt_tokens_total", variant="pruned")] == 100
    assert seen[key("generated_tokens_total", variant="pruned")] == 20
    assert seen[key("request_prompt_tokens_bucket", variant="pruned", le="64.0")] == 0
    assert seen[key("request_prompt_tokens_bucket", variant="pruned", le="128.0")] == 1
    assert seen[key("request_generated_tokens_sum", variant="pruned")] == 20


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("queue_time", 0.5),
        ("prefill_time", 1.5),
        ("time_to_first_token", 2.0),
        ("decode_time", 3.0),
        ("end_to_end_latency", 5.0),
    ],
)
def test_stages_come_from_the_timeline(name: str, seconds: float) -> None:
    metrics = build()
    metrics.finished("full", "length", 1, 1, WHOLE)
    seen = samples(metrics)
    assert seen[key(f"{name}_seconds_sum", variant="full")] == pytest.approx(seconds)
    assert seen[key(f"{name}_seconds_count", variant="full")] == 1


def test_stages_never_reached_are_not_observed() -> None:
    metrics = build()
    metrics.finished("full", "abort", 9, 0, Timeline(1.0, None, None, 3.0))
    metrics.finished("full", "abort", 9, 0, Timeline(1.0, 2.0, None, 3.0))
    seen = samples(metrics)
    counts = {
        name: seen[key(f"{name}_seconds_count", variant="full")]
        for name in ("end_to_end_latency", "queue_time", "time_to_first_token", "prefill_time")
    }
    assert counts == {
        "end_to_end_latency": 2,
        "queue_time": 1,
        "time_to_first_token": 0,
        "prefill_time": 0,
    }
    assert seen[key("decode_time_seconds_count", variant="full")] == 0


def test_inter_token_latency_resolves_one_and_two_milliseconds() -> None:
    metrics = build()
    for seconds in (0.0005, 0.0015, 0.004):
        metrics.token_emitted("full", seconds)
    seen = samples(metrics)
    bounds = ("0.001", "0.002", "0.005", "2.5")
    buckets = [
        seen[key("inter_token_latency_seconds_bucket", variant="full", le=le)] for le in bounds
    ]
    assert buckets == [1, 2, 3, 3]


@pytest.mark.parametrize(
    "values",
    [[0.001] * 3, [0.001, 0.0300001, 9.0, 9.0], [0.0, *[0.0300001] * 500, 0.025, 0.0300001]],
)
def test_equal_latencies_count_as_often_as_they_come(values: list[float]) -> None:
    metrics = build()
    for seconds in values:
        metrics.token_emitted("full", seconds)
        metrics.token_emitted("pruned", 0.2)
    seen = samples(metrics)
    for le, bound in (("0.001", 0.001), ("0.025", 0.025), ("0.05", 0.05), ("+Inf", float("inf"))):
        bucket = seen[key("inter_token_latency_seconds_bucket", variant="full", le=le)]
        assert bucket == sum(seconds <= bound for seconds in values)
    assert seen[key("inter_token_latency_seconds_sum", variant="full")] == pytest.approx(
        sum(values)
    )
    assert seen[key("inter_token_latency_seconds_count", variant="pruned")] == len(values)
    again = samples(metrics)
    assert again[key("inter_token_latency_seconds_count", variant="full")] == len(values)


def test_refused_requests_are_counted_by_reason() -> None:
    metrics = build()
    metrics.refused("queue_full")
    metrics.refused("queue_full")
    metrics.refused("draining")
    seen = samples(metrics)
    refused = {r: seen[key("requests_refused_total", reason=r)] for r in REFUSAL_REASONS}
    assert refused == {"queue_full": 2, "draining": 1, "invalid": 0, "unauthorized": 0}


def test_the_engine_is_read_at_each_scrape() -> None:
    snapshots = iter((IDLE, BUSY))
    metrics = build(lambda: next(snapshots))
    assert samples(metrics)[key("engine_steps_total")] == 0
    seen = samples(metrics)
    assert seen[key("engine_steps_total")] == 77
    assert seen[key("device_busy_seconds_total")] == 40
    assert seen[key("device_idle_seconds_total")] == 2.5
    assert seen[key("requests_running", variant="pruned")] == 4
    assert seen[key("requests_waiting", variant="full")] == 1
    assert seen[key("kv_cache_used_bytes", variant="full")] == 500
    assert seen[key("preemptions_total", variant="full")] == 3
    assert seen[key("kv_cache_cached_bytes", variant="full")] == 100
    assert seen[key("prefix_cache_queries_tokens_total", variant="full")] == 80
    assert seen[key("prefix_cache_hit_tokens_total", variant="full")] == 60
    assert seen[key("prefix_cache_hit_tokens_total", variant="pruned")] == 0
    assert seen[key("kv_cache_capacity_bytes")] == 1_000
    assert seen[key("kv_cache_utilization_ratio")] == 0.75


def test_what_a_variant_is() -> None:
    seen = samples(build())
    assert seen[key("variant_attention_layers", variant="pruned")] == 15
    assert seen[key("variant_dropped_layers", variant="pruned")] == 15
    assert seen[key("variant_dropped_layers", variant="full")] == 0
    assert seen[key("variant_kv_bytes_per_token", variant="pruned")] == 11_520
    assert seen[key("variant_capacity_tokens", variant="full")] == 4_000
    assert seen[key("plan_info", **PLAN, version="0.1.0")] == 1


def test_what_a_variant_is_worth_where_that_was_measured() -> None:
    seen = samples(build())
    assert seen[key("variant_quality_kl_nats", variant="pruned")] == 0.25
    assert seen[key("variant_quality_agreement_ratio", variant="pruned")] == 0.8
    assert seen[key("variant_quality_perplexity_ratio", variant="pruned")] == 1.2
    assert seen[key("variant_substitute_bytes", variant="pruned")] == 4_096
    assert key("variant_quality_kl_nats", variant="full") not in seen
    assert seen[key("variant_substitute_bytes", variant="full")] == 0


def test_a_dead_engine_and_an_empty_pool_still_render() -> None:
    dead = replace(IDLE, alive=False, pool_bytes=0)
    seen = samples(build(lambda: dead))
    assert seen[key("engine_up")] == 0
    assert seen[key("kv_cache_utilization_ratio")] == 0


def test_labels_are_bounded() -> None:
    metrics = build()
    with pytest.raises(ValueError, match="unknown variant 'half'; use one of full, pruned"):
        metrics.token_emitted("half", 0.1)
    with pytest.raises(ValueError, match="unknown finish reason 'done'"):
        metrics.finished("full", "done", 1, 1, WHOLE)
    with pytest.raises(ValueError, match="unknown refusal reason 'tired'"):
        metrics.refused("tired")
    assert samples(metrics)[key("prompt_tokens_total", variant="full")] == 0


@pytest.mark.parametrize("variants", [(), (FULL, FULL)])
def test_variants_must_be_there_and_distinct(variants: tuple[VariantInfo, ...]) -> None:
    with pytest.raises(ValueError, match="at least one variant and distinct names"):
        Metrics("smol", variants, EVIDENCE, PLAN, version="0", stats=lambda: IDLE)


def test_stats_about_other_variants_are_an_error() -> None:
    stray = EngineStats(True, 10, (_idle("half"),), 0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"\['half'\].*\['full', 'pruned'\]"):
        build(lambda: stray).render()


def test_openmetrics_is_answered_when_asked_for() -> None:
    metrics = build(lambda: BUSY)
    body, content_type = metrics.render("application/openmetrics-text;version=1.0.0;q=0.8")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    seen = by_labels(parse_openmetrics(body.decode()))  # type: ignore[no-untyped-call]
    assert seen[key("engine_steps_total")] == 77
    assert seen[key("device_busy_seconds_total")] == 40
    assert seen[key("device_idle_seconds_total")] == 2.5
    assert metrics.render("*/*")[1].startswith("text/plain; version=0.0.4")


def test_two_servers_in_one_process_share_nothing() -> None:
    first, second = build(), build()
    first.refused("invalid")
    assert samples(second)[key("requests_refused_total", reason="invalid")] == 0


def test_process_metrics_are_included() -> None:
    assert samples(build())["process_cpu_seconds_total", frozenset()] > 0


def test_promtool_has_nothing_to_say() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH; install Prometheus to lint the metric names")
    body, _ = build().render()
    lint = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, b"")


def test_scrapes_and_observations_may_overlap() -> None:
    metrics = build()
    observations = 2_000

    def observe() -> None:
        for _ in range(observations):
            metrics.token_emitted("full", 0.01)
            metrics.finished("pruned", "stop", 3, 4, WHOLE)

    threads = [threading.Thread(target=observe) for _ in range(2)]
    for thread in threads:
        thread.start()
    counted = [0.0]
    while any(thread.is_alive() for thread in threads):
        counted.append(samples(metrics)[key("prompt_tokens_total", variant="pruned")])
    for thread in threads:
        thread.join()
    seen = samples(metrics)
    assert counted == sorted(counted)
    assert seen[key("inter_token_latency_seconds_count", variant="full")] == 2 * observations
    assert seen[key("generated_tokens_total", variant="pruned")] == 2 * observations * 4
