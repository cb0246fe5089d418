"""The upstreams' state as the gateway's metrics: under the server's own names, summed by variant.

So the same dashboard shows one server or many. What no upstream tells is left out, not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.gateway.figures import BY_SERVER, BY_VARIANT, UTILIZATION, Combine
from server.gateway.scrape import WHOLE_SERVER
from server.gateway.upstream import Pool, Upstream


class UpstreamCollector(Collector):
    """What the upstreams said when they were last asked."""

    def __init__(self, model_name: str, pools: Sequence[Pool]) -> None:
        self._model_name = model_name
        self._pools = tuple(pools)
        found = (upstream for pool in pools for upstream in pool.upstreams)
        self._upstreams = tuple(dict.fromkeys(found))

    def collect(self) -> Iterator[Metric]:
        for name, (combine, text) in BY_VARIANT.items():
            yield self._by_variant(name, text, combine)
        for name, (combine, text) in BY_SERVER.items():
            values = list(_values(self._upstreams, WHOLE_SERVER, name))
            yield self._single(name, text, [combine(values)] if values else [])
        yield self._single(
            UTILIZATION,
            "Share of the upstreams' KV memory that requests own, from 0 to 1.",
            list(self._utilization()),
        )
        alive = float(any(pool.alive for pool in self._pools))
        yield self._single("engine_up", "1 while any upstream can answer.", [alive])
        yield from self._by_upstream()

    def _utilization(self) -> Iterator[float]:
        """Weighted by capacity where that is known of all."""
        ratios = list(_values(self._upstreams, WHOLE_SERVER, UTILIZATION))
        sizes = list(_values(self._upstreams, WHOLE_SERVER, "kv_cache_capacity_bytes"))
        if not ratios:
            return
        weights = sizes if len(sizes) == len(ratios) and any(sizes) else [1.0] * len(ratios)
        yield sum(r * w for r, w in zip(ratios, weights, strict=True)) / sum(weights)

    def _by_variant(self, name: str, text: str, combine: Combine) -> Metric:
        family = _family(name, text, ("model_name", "variant"))
        for pool in self._pools:
            values = list(_values(pool.upstreams, pool.variant, name))
            if values:
                family.add_metric((self._model_name, pool.variant), combine(values))
        return family

    def _single(self, name: str, text: str, values: Sequence[float]) -> Metric:
        family = _family(name, text, ("model_name",))
        for value in values:
            family.add_metric((self._model_name,), value)
        return family

    def _by_upstream(self) -> Iterator[Metric]:
        labels = ("model_name", "upstream")
        up = _family("upstream_up", "1 while requests may go to the upstream.", labels)
        open_ = _family("upstream_outstanding_requests", "Requests that have not ended.", labels)
        failed = _family("upstream_failures_total", "Requests in which it failed.", labels)
        for upstream in self._upstreams:
            whose = (self._model_name, upstream.url)
            up.add_metric(whose, float(upstream.available))
            open_.add_metric(whose, upstream.outstanding)
            failed.add_metric(whose, upstream.failed_total)
        yield from (up, open_, failed)


def _values(upstreams: Iterable[Upstream], variant: str, name: str) -> Iterator[float]:
    for upstream in upstreams:
        if (value := upstream.usage.get(variant, {}).get(name)) is not None:
            yield value


def _family(name: str, text: str, labels: Sequence[str]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(f"attndrop_{name}", text, labels=labels)
