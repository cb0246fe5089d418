"""What an upstream's /metrics says, in the words of the server's own metrics.

Understands attndrop's names and vLLM's. Reads only the lines it needs: an engine's metrics are
long, and parsing them whole would hold up the event loop's thread.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from server.gateway.figures import BY_SERVER, BY_VARIANT, UTILIZATION
from server.gateway.upstream import Usage

WHOLE_SERVER = ""

_VLLM = {
    "vllm:num_requests_running": "requests_running",
    "vllm:num_requests_waiting": "requests_waiting",
    "vllm:num_preemptions_total": "preemptions_total",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries_tokens_total",
    "vllm:prefix_cache_hits_total": "prefix_cache_hit_tokens_total",
}
_VLLM_USED = "vllm:kv_cache_usage_perc"
_VLLM_CACHE = "vllm:cache_config_info"

_OF_SERVERS = {*BY_SERVER, UTILIZATION}

_SAMPLE = re.compile(r"(?P<name>[a-z_:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class _Sample:
    name: str
    labels: Mapping[str, str]
    value: float


def read_usage(text: str, variant: str) -> Usage:
    """Return what the metrics say, by variant.

    Args:
        text: Prometheus's text format.
        variant: whose all of it is if the server is not attndrop's.
    """
    samples = list(_samples(text))
    if any(sample.name.startswith("vllm:") for sample in samples):
        return _of_vllm(samples, variant)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for sample in samples:
        name = sample.name.removeprefix("attndrop_")
        if name in BY_VARIANT:
            found[sample.labels.get("variant", WHOLE_SERVER)][name] = sample.value
        elif name in _OF_SERVERS:
            found[WHOLE_SERVER][name] = sample.value
    return found


def _samples(text: str) -> Iterator[_Sample]:
    wanted = {*_VLLM, _VLLM_USED, _VLLM_CACHE}
    wanted |= {f"attndrop_{name}" for name in {*BY_VARIANT, *_OF_SERVERS}}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in wanted and (match := _SAMPLE.fullmatch(line)):
            labels = dict(_LABEL.findall(match["labels"] or ""))
            yield _Sample(name, labels, float(match["value"]))


def _of_vllm(samples: list[_Sample], variant: str) -> Usage:
    """One vLLM server may run several engines (data parallelism), each with a cache of its own."""
    own: dict[str, float] = defaultdict(float)
    tokens = capacity = 0.0
    shares: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for sample in samples:
        engine = sample.labels.get("engine", "0")
        if sample.name in _VLLM:
            own[_VLLM[sample.name]] += sample.value
        elif sample.name == _VLLM_USED:
            shares[engine] = sample.value
        elif sample.name == _VLLM_CACHE:
            sizes[engine] = _number(sample.labels.get("kv_cache_memory_bytes"))
            tokens += _cache_tokens(sample.labels)
    capacity = sum(sizes.values())
    whole: dict[str, float] = {}
    if shares:
        whole["kv_cache_utilization_ratio"] = sum(shares.values()) / len(shares)
    if tokens:
        own["variant_capacity_tokens"] = tokens
    if capacity:
        own["kv_cache_used_bytes"] = sum(
            sizes.get(engine, 0.0) * share for engine, share in shares.items()
        )
        whole["kv_cache_capacity_bytes"] = capacity
    if capacity and tokens:
        own["variant_kv_bytes_per_token"] = round(capacity / tokens)
    return {variant: own, WHOLE_SERVER: whole}


def _cache_tokens(labels: Mapping[str, str]) -> float:
    blocks = _number(labels.get("num_gpu_blocks")) * _number(labels.get("block_size"))
    return _number(labels.get("kv_cache_size_tokens")) or blocks


def _number(text: str | None) -> float:
    """Return the number in a label, 0 where it says None."""
    return float(text) if text and _NUMBER.fullmatch(text) else 0.0
