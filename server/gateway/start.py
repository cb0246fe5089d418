"""From settings to a gateway that only lacks a socket."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastapi import FastAPI

from server import __version__
from server.api import models, operations
from server.app import create_app
from server.config import PRUNED
from server.gateway import routes
from server.gateway.forward import Forwarder, Timeouts
from server.gateway.front import GatewayFront
from server.gateway.metrics import UpstreamCollector
from server.gateway.monitor import Monitor
from server.gateway.routing import Split
from server.gateway.settings import EVERY, GatewaySettings
from server.gateway.upstream import Agreement, Identity, Pool, Upstream
from server.metrics import PlanCollector, RequestMetrics

logger = logging.getLogger(__name__)

_POLL = 0.5


class GatewayError(ValueError):
    """The upstreams do not answer, or do not fit together."""


@dataclass(frozen=True, slots=True)
class StartedGateway:
    """A gateway that only lacks a socket. Its worker is not running yet."""

    app: FastAPI
    front: GatewayFront
    worker: GatewayWorker


class GatewayWorker:
    """What works behind the gateway's front."""

    def __init__(self, monitors: Sequence[Monitor], forwarder: Forwarder) -> None:
        self._monitors = tuple(monitors)
        self._forwarder = forwarder

    def start(self) -> None:
        for monitor in self._monitors:
            monitor.start()

    def stop(self) -> None:
        """End it, and the calls that are still being forwarded: their clients are told."""
        self._forwarder.shut()
        for monitor in self._monitors:
            monitor.stop()


def start_gateway(settings: GatewaySettings) -> StartedGateway:
    """Find the upstreams and build what passes requests on to them.

    Raises:
        GatewayError: with one sentence for the user.
    """
    headers = _upstream_headers(settings)
    watched = {
        name: list(_watched(name, urls, settings.health_interval, headers))
        for name, urls in settings.pools().items()
    }
    _wait(watched, settings.start_timeout)
    pools = _pools({name: [u for u, _ in pairs] for name, pairs in watched.items()})
    front = _front(settings, pools, headers)
    app = create_app(
        front,
        (routes.router, models.router, operations.router),
        api_keys=settings.api_key,
        cors_origins=settings.cors_origin,
        max_body_size=settings.max_body_size,
    )
    monitors = [monitor for pairs in watched.values() for _, monitor in pairs]
    return StartedGateway(app, front, GatewayWorker(monitors, front.forwarder))


def _upstream_headers(settings: GatewaySettings) -> dict[str, str]:
    key = settings.upstream_api_key
    return {"Authorization": f"Bearer {key}"} if key else {}


def _watched(
    pool: str, urls: Sequence[str], interval: float, headers: Mapping[str, str]
) -> Iterator[tuple[Upstream, Monitor]]:
    agreement = Agreement()
    for url in urls:
        upstream = Upstream(url)
        yield upstream, Monitor(upstream, pool, agreement, interval, headers)


def _wait(watched: Mapping[str, Sequence[tuple[Upstream, Monitor]]], seconds: float) -> None:
    """Look at all upstreams until every pool has one that answers."""
    deadline = time.monotonic() + seconds
    while True:
        for _, monitor in (pair for pairs in watched.values() for pair in pairs):
            monitor.look()
        silent = [name for name, pairs in watched.items() if not any(u.reachable for u, _ in pairs)]
        if not silent:
            return
        if time.monotonic() > deadline:
            urls = ", ".join(u.url for name in silent for u, _ in watched[name])
            raise GatewayError(
                f"no upstream of {', '.join(silent)} answered within {seconds:g} s ({urls}); start "
                "them first, or raise --start-timeout"
            )
        time.sleep(_POLL)


def _pools(upstreams: Mapping[str, Sequence[Upstream]]) -> dict[str, Pool]:
    """Return a pool for every variant.

    Raises:
        GatewayError: attndrop servers do not have the variants that are asked of them.
    """
    pools: dict[str, Pool] = {}
    for name, members in upstreams.items():
        identity = _identity(members)
        names = list(identity.variants) if name == EVERY else [name]
        if name == EVERY and not names:
            raise GatewayError(
                f"{members[0].url} is no attndrop server; name its variant, as in "
                f"full={members[0].url}"
            )
        if identity.is_attndrop and name != EVERY and name not in identity.variants:
            raise GatewayError(
                f"{members[0].url} has no variant {name!r}, only {', '.join(identity.variants)}"
            )
        pools.update({variant: Pool(variant, members) for variant in names})
    return pools


def _identity(upstreams: Sequence[Upstream]) -> Identity:
    """Return what the first upstream that answered says."""
    return next(u.identity for u in upstreams if u.identity is not None)


def _default(pools: Mapping[str, Pool], first: Identity) -> str:
    """Return the upstream's own default, else `pruned`, else what was named first."""
    wanted = [name for name in (first.default_variant, PRUNED) if name in pools]
    return str(wanted[0]) if wanted else next(iter(pools))


def _front(
    settings: GatewaySettings, pools: Mapping[str, Pool], headers: Mapping[str, str]
) -> GatewayFront:
    first = _identity(next(iter(pools.values())).upstreams)
    name = settings.model_name or first.model
    collectors = [UpstreamCollector(name, list(pools.values()))]
    labels = {"plan_id": first.plan_id or ""}
    plan = [PlanCollector(name, labels, __version__)] if first.plan_id else []
    weights = settings.weights()
    default = (settings.default_variant or _default(pools, first)).lower()
    for given in (default, *weights):
        if given not in pools:
            raise GatewayError(f"there is no variant {given!r}, only {', '.join(pools)}")
    return GatewayFront(
        metrics=RequestMetrics(name, list(pools), [*collectors, *plan]),
        model_name=name,
        plan_id=first.plan_id,
        version=__version__,
        default_variant=default,
        created=int(time.time()),
        pools=pools,
        forwarder=Forwarder(
            Timeouts(settings.connect_timeout, settings.silence_timeout, settings.request_timeout)
        ),
        split=Split(weights) if weights else None,
        sticky_header=settings.sticky_header,
        upstream_headers=headers,
    )
