"""Watching the upstreams: who they are, whether they are well, and what their metrics say.

One thread an upstream, so that one that hangs holds up no other, and the event loop does none of
it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx

from server.gateway.scrape import read_usage
from server.gateway.upstream import Agreement, Identity, Upstream

logger = logging.getLogger(__name__)

_TIMEOUT = 2.0
_METRICS_INTERVAL = 5.0


class Monitor:
    """Watches one upstream until it is stopped."""

    def __init__(
        self,
        upstream: Upstream,
        variant: str,
        agreement: Agreement,
        interval: float,
        headers: Mapping[str, str],
    ) -> None:
        self._upstream = upstream
        self._agreement = agreement
        self._variant = variant
        self._interval = interval
        self._client = httpx.Client(base_url=upstream.url, timeout=_TIMEOUT, headers=headers)
        self._stop = threading.Event()
        self._scraped = 0.0
        self._thread = threading.Thread(
            target=self._run, name=f"monitor {upstream.url}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.look()
        self._client.close()

    def look(self) -> None:
        """Ask once; whatever goes wrong means that the upstream is not reachable."""
        upstream = self._upstream
        try:
            if upstream.identity is None:
                identity = read_identity(self._get("/v1/models").json())
                self._agreement.check(identity)
                upstream.identity = identity
            path = "/ready" if upstream.identity.is_attndrop else "/health"
            self._get(path)
            self._set_reachable(True, "")
            if time.monotonic() - self._scraped >= _METRICS_INTERVAL:
                upstream.usage = read_usage(self._get("/metrics").text, self._variant)
                self._scraped = time.monotonic()
        except (httpx.HTTPError, ValueError, KeyError, TypeError, LookupError) as error:
            self._set_reachable(False, str(error).partition("\n")[0] or type(error).__name__)

    def _get(self, path: str) -> httpx.Response:
        return self._client.get(path).raise_for_status()

    def _set_reachable(self, reachable: bool, why: str) -> None:
        if reachable != self._upstream.reachable:
            logger.log(
                logging.INFO if reachable else logging.WARNING,
                "upstream %s is %s%s",
                self._upstream.url,
                "well" if reachable else "not reachable: ",
                why,
            )
        self._upstream.reachable = reachable


def read_identity(models: Mapping[str, Any]) -> Identity:
    """Return what an answer of /v1/models says.

    Raises:
        LookupError, TypeError: it is not such an answer.
    """
    entries = models["data"]
    first = entries[0]
    if not isinstance(first.get("variant"), dict):
        return Identity(str(first["id"]), first.get("max_model_len"), {})
    name, own = str(first["root"]), first["variant"]
    variants = {e["variant"]["name"]: e for e in entries if e["id"] != name}
    return Identity(name, first.get("max_model_len"), variants, own["plan"], own["name"])
