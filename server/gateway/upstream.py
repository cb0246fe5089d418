"""Upstreams: the servers behind the gateway, what is known of them, and which one is next.

Plain state without input or output. Monitors write `identity`, `reachable` and `usage` from their
threads, each in one assignment; everything else belongs to the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TOLERATED_ANSWERS = 3
"""Server errors in a row after which an upstream is ejected; broken connections eject at once."""
_FIRST_EJECTION = 1.0
_LONGEST_EJECTION = 30.0


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server says it serves."""

    model: str
    """Its own name of the model."""
    max_model_len: int | None
    variants: Mapping[str, Mapping[str, Any]]
    """Of an attndrop server: what its models list says of each variant. Else empty."""
    plan_id: str | None = None
    default_variant: str | None = None

    @property
    def is_attndrop(self) -> bool:
        return bool(self.variants)


class Agreement:
    """What the attndrop servers of one pool have in common: the model, and each variant's layers.

    Requests of one client may go to any of them, so that they must not differ.
    """

    def __init__(self) -> None:
        self._common: Mapping[str, Any] | None = None

    def check(self, identity: Identity) -> None:
        """Take the first server's word for it, and raise ValueError for one that differs."""
        if not identity.is_attndrop:
            return
        told = {
            name: [entry["variant"].get(key, []) for key in ("dropped_layers", "dropped_mlps")]
            for name, entry in identity.variants.items()
        }
        common = {"model": identity.model, "dropped layers and MLPs": told}
        self._common = self._common or common
        if self._common != common:
            raise ValueError(
                f"it serves {common}, but another server of its pool {self._common}; start all "
                "with the same --model and --plan"
            )


Usage = Mapping[str, Mapping[str, float]]
"""By variant ("" for the whole server): values by metric name, as the server's own metrics call
them without `attndrop_`."""


@dataclass(slots=True, eq=False)
class Upstream:
    """One server."""

    url: str
    identity: Identity | None = None
    reachable: bool = False
    """Whether the latest health check said so."""
    usage: Usage = field(default_factory=dict)
    outstanding: int = 0
    """Requests that were sent to it and have not ended."""
    failed_total: int = 0
    _failures: int = 0
    _ejected_until: float = 0.0

    @property
    def available(self) -> bool:
        return (
            self.reachable and self.identity is not None and time.monotonic() >= self._ejected_until
        )

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, *, connection: bool) -> None:
        """Count a failure, and eject the upstream for a while: longer each time in a row.

        Requests that break together are one failure: what comes while it is ejected adds nothing.

        Args:
            connection: whether it broke or hung, rather than answering with a server error.
        """
        self.failed_total += 1
        if time.monotonic() < self._ejected_until:
            return
        self._failures += 1
        if connection or self._failures >= _TOLERATED_ANSWERS:
            seconds = min(_LONGEST_EJECTION, _FIRST_EJECTION * 2 ** (self._failures - 1))
            self._ejected_until = time.monotonic() + seconds


class Pool:
    """The upstreams of one variant. Upstreams of every variant are in several pools."""

    def __init__(self, variant: str, upstreams: Sequence[Upstream]) -> None:
        self.variant = variant
        self.upstreams = tuple(upstreams)
        self._turn = 0

    def pick(self, tried: Collection[Upstream]) -> Upstream | None:
        """Return the available upstream with the fewest outstanding requests, taking turns."""
        self._turn += 1
        count = len(self.upstreams)
        turns = (self.upstreams[(self._turn + offset) % count] for offset in range(count))
        free = [upstream for upstream in turns if upstream.available and upstream not in tried]
        return min(free, key=lambda upstream: upstream.outstanding, default=None)

    @property
    def alive(self) -> bool:
        return any(upstream.available for upstream in self.upstreams)
