"""What upstreams' metrics are read for: the server's own names, how the values of several upstreams
become one, and what that says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

Combine = Callable[[Iterable[float]], float]

BY_VARIANT: Mapping[str, tuple[Combine, str]] = {
    "variant_attention_layers": (max, "Decoder layers in which the variant keeps attention."),
    "variant_dropped_layers": (max, "Decoder layers whose attention sublayer it drops."),
    "variant_kv_bytes_per_token": (max, "Bytes of keys and values stored for one token."),
    "variant_capacity_tokens": (math.fsum, "Tokens that fit if only this variant is used."),
    "requests_running": (math.fsum, "Requests that upstreams are computing."),
    "requests_waiting": (math.fsum, "Requests in the upstreams' queues."),
    "kv_cache_used_bytes": (math.fsum, "Bytes of KV memory that the variant's requests own."),
    "kv_cache_cached_bytes": (math.fsum, "Bytes of pages kept for prompts that begin alike."),
    "preemptions_total": (math.fsum, "Times a running request lost its pages."),
    "prefix_cache_queries_tokens_total": (math.fsum, "Prompt tokens looked for in prefix caches."),
    "prefix_cache_hit_tokens_total": (math.fsum, "Prompt tokens found in prefix caches."),
}
BY_SERVER: Mapping[str, tuple[Combine, str]] = {
    "kv_cache_capacity_bytes": (math.fsum, "Bytes of KV memory of all upstreams."),
    "engine_steps_total": (math.fsum, "Steps of all upstreams."),
}

UTILIZATION = "kv_cache_utilization_ratio"
"""Told by a server, and weighted by capacity where there are several."""
