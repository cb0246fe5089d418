"""Prometheus metrics: what requests experienced, and what the engine says of itself at scrape time.

This file knows prometheus_client and the engine's frozen snapshots. It must not know FastAPI, the
engine's objects or tensors: the API layer calls the verbs of `Metrics`, and the state of the
engine arrives through one callable. Each `Metrics` owns its registry, so nothing is shared between
two servers in one process.

Labels are bounded: only the declared variants, finish reasons and refusal reasons exist, and every
one of their series is there from the first scrape, at zero. Names carry base units (seconds,
bytes, tokens) and no colons, which are reserved for recording rules.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from server.engine.stats import EngineStats, Timeline, VariantInfo, VariantStats
from server.evidence import Evidence

FINISH_REASONS = ("stop", "length", "abort", "error")
REFUSAL_REASONS = ("queue_full", "draining", "invalid", "unauthorized")

# fmt: off
_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0,
)
_INTER_TOKEN_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)
# fmt: on
_END_TO_END_BUCKETS = tuple(round(0.01 * 2**n, 2) for n in range(15))  # 10 ms ... 164 s
_TOKEN_BUCKETS = tuple(float(2**n) for n in range(18))  # 1 ... 131072

_Labels = tuple[str, str]
"""The values of `model_name` and `variant`."""


class _Histogram(Histogram):
    """A histogram that can be told at once of a value that was seen several times."""

    def observe_times(self, amount: float, times: int) -> None:
        """Do what `observe(amount)` does, so many times."""
        self._sum.inc(amount * times)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(times)


class _Gaps:
    """Inter-token latencies of one variant, observed together as long as they are the same.

    Those of one step are, for all requests that ran in the step before it, too.
    """

    def __init__(self, histogram: _Histogram) -> None:
        self._histogram = histogram
        self._lock = Lock()
        self._seconds = 0.0
        self._times = 0
        """How often `_seconds` was seen and not observed yet."""

    def add(self, seconds: float) -> None:
        with self._lock:
            if seconds != self._seconds:
                self._observe()
                self._seconds = seconds
            self._times += 1

    def flush(self) -> None:
        """Observe what was not yet."""
        with self._lock:
            self._observe()

    def _observe(self) -> None:
        if self._times:
            self._histogram.observe_times(self._seconds, self._times)
            self._times = 0


class RequestMetrics:
    """What requests experienced, and whatever else `collectors` tell.

    Raises ValueError if `variants` is empty or names one twice.
    """

    def __init__(
        self, model_name: str, variants: Sequence[str], collectors: Sequence[Collector]
    ) -> None:
        self._labels = _labels_by_variant(model_name, variants)
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._create_latencies()
        self._create_sizes()
        self._create_counters()
        self._start_series_at_zero()
        for collector in collectors:
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)

    def token_emitted(self, variant: str, seconds_since_previous: float) -> None:
        """Count one token after a request's first, and the seconds since the token before it."""
        _require("variant", variant, self._labels)
        self._gaps_of[variant].add(seconds_since_previous)

    def finished(
        self,
        variant: str,
        reason: str,
        prompt_tokens: int,
        generated_tokens: int,
        timeline: Timeline,
    ) -> None:
        """Count one request at its terminal event; stages it never reached are not observed."""
        labels = self._labels_of(variant)
        _require("finish reason", reason, FINISH_REASONS)
        self._requests_finished.labels(*labels, reason).inc()
        self._prompt_tokens.labels(*labels).inc(prompt_tokens)
        self._generated_tokens.labels(*labels).inc(generated_tokens)
        self._request_prompt_tokens.labels(*labels).observe(prompt_tokens)
        self._request_generated_tokens.labels(*labels).observe(generated_tokens)
        self._observe_stages(labels, timeline)

    def refused(self, reason: str) -> None:
        """Count one request that was refused before it reached the engine."""
        _require("refusal reason", reason, REFUSAL_REASONS)
        self._requests_refused.labels(self._model_name, reason).inc()

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """The body and its content type; OpenMetrics when the Accept header asks for it."""
        for gaps in self._gaps_of.values():
            gaps.flush()
        encode, content_type = choose_encoder(accept or "")
        return encode(self._registry), content_type

    def _observe_stages(self, labels: _Labels, timeline: Timeline) -> None:
        spans = (
            (self._end_to_end, timeline.arrived, timeline.finished),
            (self._first_token, timeline.arrived, timeline.first_token),
            (self._queue, timeline.arrived, timeline.first_scheduled),
            (self._prefill, timeline.first_scheduled, timeline.first_token),
            (self._decode, timeline.first_token, timeline.finished),
        )
        for histogram, start, end in spans:
            if start is not None and end is not None:
                histogram.labels(*labels).observe(end - start)

    def _labels_of(self, variant: str) -> _Labels:
        _require("variant", variant, self._labels)
        return self._labels[variant]

    def _create_latencies(self) -> None:
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "Seconds from a request's arrival to its first generated token.",
            _FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Seconds between one generated token of a request and the next.",
            _INTER_TOKEN_BUCKETS,
        )
        self._end_to_end = self._histogram(
            "end_to_end_latency_seconds",
            "Seconds from a request's arrival to its terminal event, whatever that was.",
            _END_TO_END_BUCKETS,
        )
        self._queue = self._histogram(
            "queue_time_seconds",
            "Seconds from a request's arrival to the first step that computed any of it.",
            _FIRST_TOKEN_BUCKETS,
        )
        self._prefill = self._histogram(
            "prefill_time_seconds",
            "Seconds from the first step that computed any of a request to its first token.",
            _FIRST_TOKEN_BUCKETS,
        )
        self._decode = self._histogram(
            "decode_time_seconds",
            "Seconds from a request's first token to its terminal event.",
            _END_TO_END_BUCKETS,
        )

    def _create_sizes(self) -> None:
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of each ended request.", _TOKEN_BUCKETS
        )
        self._request_generated_tokens = self._histogram(
            "request_generated_tokens", "Generated tokens of each ended request.", _TOKEN_BUCKETS
        )

    def _create_counters(self) -> None:
        self._requests_finished = self._counter(
            "requests_finished_total",
            "Requests that reached a terminal event, by finish reason.",
            ("model_name", "variant", "finish_reason"),
        )
        self._prompt_tokens = self._counter(
            "prompt_tokens_total",
            "Prompt tokens, counted when their request ends.",
            ("model_name", "variant"),
        )
        self._generated_tokens = self._counter(
            "generated_tokens_total",
            "Generated tokens, counted when their request ends.",
            ("model_name", "variant"),
        )
        self._requests_refused = self._counter(
            "requests_refused_total",
            "Requests refused before they reached the engine, by reason.",
            ("model_name", "reason"),
        )

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> _Histogram:
        return _Histogram(
            f"attndrop_{name}",
            help_text,
            ("model_name", "variant"),
            buckets=buckets,
            registry=self._registry,
        )

    def _counter(self, name: str, help_text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"attndrop_{name}", help_text, labels, registry=self._registry)

    def _start_series_at_zero(self) -> None:
        """A series exists once its labels were named; without this, dashboards show gaps."""
        per_variant = (
            self._first_token,
            self._inter_token,
            self._end_to_end,
            self._queue,
            self._prefill,
            self._decode,
            self._request_prompt_tokens,
            self._request_generated_tokens,
            self._prompt_tokens,
            self._generated_tokens,
        )
        for labels in self._labels.values():
            for family in per_variant:
                family.labels(*labels)
            for reason in FINISH_REASONS:
                self._requests_finished.labels(*labels, reason)
        for reason in REFUSAL_REASONS:
            self._requests_refused.labels(self._model_name, reason)
        self._gaps_of = {
            variant: _Gaps(self._inter_token.labels(*labels))
            for variant, labels in self._labels.items()
        }


class Metrics(RequestMetrics):
    """The metrics of a server with an engine.

    `plan` holds labels that say which plan it is, `plan_id` among them. `stats` is called once per
    scrape and must be cheap and safe at any time, also when the engine is dead. Raises ValueError
    if `variants` is empty or names one twice.
    """

    def __init__(
        self,
        model_name: str,
        variants: Sequence[VariantInfo],
        evidence: Mapping[str, Evidence],
        plan: Mapping[str, str],
        version: str,
        stats: Callable[[], EngineStats],
    ) -> None:
        collectors = (
            _EngineCollector(model_name, variants, stats),
            _EvidenceCollector(model_name, evidence),
            PlanCollector(model_name, plan, version),
        )
        super().__init__(model_name, [variant.name for variant in variants], collectors)


class _EngineCollector(Collector):
    """What the variants are, and one snapshot of the engine per scrape."""

    def __init__(
        self,
        model_name: str,
        variants: Sequence[VariantInfo],
        stats: Callable[[], EngineStats],
    ) -> None:
        self._model_name = model_name
        self._variants = tuple(variants)
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        self._require_declared_variants(stats)
        yield from self._variant_facts()
        yield from self._variant_shares(stats.variants)
        yield from self._engine(stats)

    def _variant_facts(self) -> Iterator[Metric]:
        variants = self._variants
        yield self._by_variant(
            "variant_attention_layers",
            "Decoder layers in which the variant keeps attention.",
            ((v.name, v.attention_layers) for v in variants),
        )
        yield self._by_variant(
            "variant_dropped_layers",
            "Decoder layers whose attention sublayer the variant drops.",
            ((v.name, len(v.dropped_layers)) for v in variants),
        )
        yield self._by_variant(
            "variant_kv_bytes_per_token",
            "Bytes of keys and values that the variant stores for one token.",
            ((v.name, v.kv_bytes_per_token) for v in variants),
        )
        yield self._by_variant(
            "variant_capacity_tokens",
            "Tokens that fit in the whole page pool if only this variant uses it.",
            ((v.name, v.capacity_tokens) for v in variants),
        )

    def _variant_shares(self, variants: Sequence[VariantStats]) -> Iterator[Metric]:
        yield self._by_variant(
            "requests_running",
            "Requests that own pages and are being computed.",
            ((v.name, v.running) for v in variants),
        )
        yield self._by_variant(
            "requests_waiting",
            "Requests in the queue: new ones and preempted ones.",
            ((v.name, v.waiting) for v in variants),
        )
        yield self._by_variant(
            "kv_cache_used_bytes",
            "Bytes of the pages that the variant's requests own, a shared page counted once.",
            ((v.name, v.kv_bytes) for v in variants),
        )
        yield self._by_variant(
            "kv_cache_cached_bytes",
            "Bytes of the pages that no request owns, kept for prompts that begin alike.",
            ((v.name, v.cached_bytes) for v in variants),
        )
        yield self._total_by_variant(
            "preemptions_total",
            "Times a running request of the variant lost its pages and went back to the queue.",
            ((v.name, v.preemptions) for v in variants),
        )
        yield self._total_by_variant(
            "prefix_cache_queries_tokens_total",
            "Prompt tokens of the requests that looked for their beginning in the prefix cache.",
            ((v.name, v.prefix_asked_tokens) for v in variants),
        )
        yield self._total_by_variant(
            "prefix_cache_hit_tokens_total",
            "Prompt tokens that were found in the prefix cache and not computed again.",
            ((v.name, v.prefix_hit_tokens) for v in variants),
        )

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge(
            "engine_up", "1 while the engine runs, 0 once it is dead.", float(stats.alive)
        )
        yield self._gauge(
            "kv_cache_capacity_bytes",
            "Bytes of the page pool that all variants share.",
            stats.pool_bytes,
        )
        yield self._gauge(
            "kv_cache_utilization_ratio",
            "Share of the page pool's bytes that requests own, from 0 to 1.",
            _utilization(stats),
        )
        yield self._total(
            "engine_steps_total",
            "Steps (schedule, run, commit) since the engine started.",
            stats.steps,
        )
        yield self._total(
            "device_busy_seconds_total",
            "Seconds that a GPU spent in steps; 0 on a CPU.",
            stats.device_busy_seconds,
        )
        yield self._total(
            "device_idle_seconds_total",
            "Seconds that a GPU waited between steps although there was work; 0 on a CPU.",
            stats.device_idle_seconds,
        )

    def _by_variant(
        self, name: str, help_text: str, values: Iterable[tuple[str, int]]
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"attndrop_{name}", help_text, labels=("model_name", "variant"))
        for variant, value in values:
            family.add_metric((self._model_name, variant), value)
        return family

    def _total_by_variant(
        self, name: str, help_text: str, values: Iterable[tuple[str, int]]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(
            f"attndrop_{name}", help_text, labels=("model_name", "variant")
        )
        for variant, value in values:
            family.add_metric((self._model_name, variant), value)
        return family

    def _gauge(self, name: str, help_text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"attndrop_{name}", help_text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _total(self, name: str, help_text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"attndrop_{name}", help_text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _require_declared_variants(self, stats: EngineStats) -> None:
        declared = sorted(v.name for v in self._variants)
        told = sorted(v.name for v in stats.variants)
        if told != declared:
            raise ValueError(
                f"the engine's stats are about the variants {told}, but the metrics were declared "
                f"for {declared}; build Metrics from the same variants as the engine"
            )


class _EvidenceCollector(Collector):
    """What the plan says each variant is worth; nothing where it was not measured."""

    def __init__(self, model_name: str, evidence: Mapping[str, Evidence]) -> None:
        self._model_name = model_name
        self._evidence = evidence

    def collect(self) -> Iterator[Metric]:
        measured = {v: e.quality for v, e in self._evidence.items() if e.quality is not None}
        yield self._gauge(
            "quality_kl_nats",
            "KL(full || variant), mean over held-out calibration tokens.",
            {variant: quality.kl for variant, quality in measured.items()},
        )
        yield self._gauge(
            "quality_agreement_ratio",
            "Share of held-out calibration tokens where the most likely one is the full model's.",
            {variant: quality.agreement for variant, quality in measured.items()},
        )
        yield self._gauge(
            "quality_perplexity_ratio",
            "Perplexity on held-out calibration tokens over the full model's.",
            {variant: quality.perplexity_ratio for variant, quality in measured.items()},
        )
        yield self._gauge(
            "substitute_bytes",
            "Bytes of what stands in the places of the variant's dropped attention sublayers.",
            {variant: each.substitute_bytes for variant, each in self._evidence.items()},
        )

    def _gauge(self, name: str, help_text: str, values: Mapping[str, float]) -> GaugeMetricFamily:
        labels = ("model_name", "variant")
        family = GaugeMetricFamily(f"attndrop_variant_{name}", help_text, labels=labels)
        for variant, value in values.items():
            family.add_metric((self._model_name, variant), value)
        return family


class PlanCollector(Collector):
    """Which plan of which model is served, as labels of a constant 1."""

    def __init__(self, model_name: str, plan: Mapping[str, str], version: str) -> None:
        self._labels = {"model_name": model_name, **plan, "version": version}

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "attndrop_plan",
            "The plan that is served: its model, id and making, and the version of attndrop.",
            value=self._labels,
        )


def _labels_by_variant(model_name: str, variants: Sequence[str]) -> dict[str, _Labels]:
    labels = {name: (model_name, name) for name in variants}
    if not labels or len(labels) < len(variants):
        raise ValueError(
            f"metrics need at least one variant and distinct names; got {list(variants)}"
        )
    return labels


def _utilization(stats: EngineStats) -> float:
    """From 0 to 1; a pool without pages (no layer attends) is never in use."""
    used = sum(v.kv_bytes for v in stats.variants)
    return used / stats.pool_bytes if stats.pool_bytes else 0.0


def _require(what: str, given: str, allowed: Iterable[str]) -> None:
    """Keep labels bounded: an unknown value is the caller's mistake, never a new series."""
    if given not in allowed:
        raise ValueError(f"unknown {what} {given!r}; use one of {', '.join(allowed)}")
