"""A server to scrape: `metrics_url` answers with the metrics of the real one under traffic."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest

from server.engine.stats import EngineStats, VariantInfo, VariantStats
from server.metrics import Metrics
from tests.live import LiveServer

VARIANTS = (
    VariantInfo("full", 30, (), kv_bytes_per_token=23_040, capacity_tokens=16_384),
    VariantInfo(
        "pruned", 15, tuple(range(15, 30)), kv_bytes_per_token=11_520, capacity_tokens=32_768
    ),
)


class Traffic:
    """Sends requests of every variant, several at a time, until `stop`."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(variant,))
            for variant in ("full", "light", "pruned")
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _send(self, variant: str) -> None:
        body = {"prompt": "Once upon a time", "max_tokens": 24, "ignore_eos": True, "n": 2}
        with self._server.client(headers={"X-Model-Variant": variant}) as client:
            while not self._stopped.is_set():
                client.post("/v1/completions", json=body).raise_for_status()
                assert client.post("/v1/completions", json={"n": 0}).status_code == 400


@pytest.fixture(scope="module")
def metrics_url(live: LiveServer) -> Iterator[str]:
    """http://127.0.0.1:PORT/metrics of a server that keeps serving every variant, which takes a
    whole core: only as long as a module needs it."""
    traffic = Traffic(live)
    traffic.start()
    yield str(httpx.URL(live.url).join("/metrics"))
    traffic.stop()


@pytest.fixture
def idle_metrics() -> Metrics:
    """The metrics of a server that has just started."""
    idle = tuple(VariantStats(v.name, 0, 0, 0, 0, 0, 0, 0) for v in VARIANTS)
    stats = EngineStats(True, 1, idle, steps=0, device_busy_seconds=0, device_idle_seconds=0)
    return Metrics("smol", VARIANTS, {}, {"plan_id": "0f1e2d"}, version="0.0", stats=lambda: stats)
