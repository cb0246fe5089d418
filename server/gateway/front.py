"""The gateway as a front: its variants are its pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from server.api.errors import ApiError, unavailable
from server.api.front import Front
from server.gateway.forward import Forwarder
from server.gateway.routing import Split
from server.gateway.upstream import Pool


@dataclass(slots=True, kw_only=True)
class GatewayFront(Front):
    """A front with other servers behind it."""

    pools: Mapping[str, Pool]
    forwarder: Forwarder
    split: Split | None
    """Who answers requests that name no variant, if not the default alone."""
    sticky_header: str
    upstream_headers: Mapping[str, str]
    """Sent with every request: the upstreams' API key."""

    @property
    def variant_names(self) -> Sequence[str]:
        return tuple(self.pools)

    @property
    def alive(self) -> bool:
        return any(pool.alive for pool in self.pools.values())

    def dead(self) -> ApiError:
        return unavailable("no upstream is available", "no_upstream")

    @property
    def busy(self) -> bool:
        return any(u.outstanding for pool in self.pools.values() for u in pool.upstreams)

    def variant_of_unnamed(self, headers: Headers) -> str:
        if self.split is None:
            return self.default_variant
        return self.split.choose(headers.get(self.sticky_header))

    def facts(self, variant: str) -> dict[str, Any]:
        """Return the smallest context of the variant's upstreams, and what one of them tells."""
        known = [u.identity for u in self.pools[variant].upstreams if u.identity is not None]
        limits = [identity.max_model_len for identity in known if identity.max_model_len]
        told: dict[str, Any] = {}
        for identity in known:
            told = dict(identity.variants.get(variant, {}).get("variant", told))
        hidden = ("name", "plan")
        return {
            "max_model_len": min(limits, default=None),
            "variant": {key: value for key, value in told.items() if key not in hidden},
        }
