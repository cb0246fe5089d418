"""What the engine tells about itself: frozen snapshots, cheap to take at any time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VariantInfo:
    """What a variant is; fixed for the life of the server."""

    name: str
    attention_layers: int
    """Layers that keep attention."""
    dropped_layers: tuple[int, ...]
    kv_bytes_per_token: int
    capacity_tokens: int
    """Tokens that fit in the whole page pool if only this variant uses it."""
    dropped_mlps: tuple[int, ...] = ()
    """Layers whose MLP it drops."""


@dataclass(frozen=True, slots=True)
class VariantStats:
    """One variant's share of the engine at one moment."""

    name: str
    running: int
    """Requests that own pages and are being computed."""
    waiting: int
    """Requests queued: new ones and preempted ones."""
    kv_bytes: int
    """Bytes of the pages that the variant's requests own, a shared page counted once."""
    preemptions: int
    """Preemptions since start."""
    cached_bytes: int
    """Bytes of the pages that no request owns, kept for prompts that begin alike; given to whoever
    needs pages."""
    prefix_asked_tokens: int
    """Prompt tokens, since start, of requests that looked for their beginning in the cache."""
    prefix_hit_tokens: int
    """Those of them that were there and were not computed again."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment."""

    alive: bool
    pool_bytes: int
    variants: tuple[VariantStats, ...]
    steps: int
    """Steps run since start."""
    device_busy_seconds: float
    """Seconds that a GPU spent in steps; 0 on a CPU."""
    device_idle_seconds: float
    """Seconds that a GPU waited between two steps although there was work; 0 on a CPU."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the stages of one request were reached, in seconds of `time.monotonic()`.

    arrived   first_scheduled      first_token           finished
       |---- queue ----|---- prefill ----|---- decode ----|
    """

    arrived: float
    first_scheduled: float | None
    first_token: float | None
    finished: float
