"""A server to scrape: `metrics_url` answers with the metrics of a service under steady traffic."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from server.engine.stats import EngineStats, Timeline, VariantInfo, VariantStats
from server.metrics import FINISH_REASONS, REFUSAL_REASONS, Metrics

VARIANTS = (
    VariantInfo("full", 30, (), kv_bytes_per_token=23_040, capacity_tokens=16_384),
    VariantInfo(
        "pruned", 15, tuple(range(15, 30)), kv_bytes_per_token=11_520, capacity_tokens=32_768
    ),
)
RUNNING = 3
TOKENS_HELD = 200
GENERATED = 24


class Traffic:
    """Requests of both variants, ending a few times a second until `stop`.

    A token of a variant takes a fixed time, 8 ms with all attention layers.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.metrics = Metrics("smol", VARIANTS, plan_id="0f1e2d", version="0.0", stats=self._stats)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        endings = zip(itertools.cycle(FINISH_REASONS), itertools.cycle(REFUSAL_REASONS))
        for finish, refusal in endings:
            for variant in VARIANTS:
                self._serve(variant, finish)
            self.metrics.refused(refusal)
            if self._stopped.wait(0.1):
                return

    def _serve(self, variant: VariantInfo, reason: str) -> None:
        per_token = 0.008 * variant.attention_layers / 30
        for _ in range(GENERATED - 1):
            self.metrics.token_emitted(variant.name, per_token)
        self._steps += GENERATED
        now = time.monotonic()
        first = now - per_token * (GENERATED - 1)
        timeline = Timeline(first - 0.05, first - 0.03, first, now)
        self.metrics.finished(variant.name, reason, TOKENS_HELD, GENERATED, timeline)

    def _stats(self) -> EngineStats:
        held = RUNNING * TOKENS_HELD
        return EngineStats(
            alive=True,
            pool_bytes=16_384 * 23_040,
            variants=tuple(
                VariantStats(v.name, RUNNING, 1, held * v.kv_bytes_per_token, 0) for v in VARIANTS
            ),
            steps=self._steps,
        )


def _handler(metrics: Metrics) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, content_type = metrics.render(self.headers.get("Accept"))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not worth a line each in the test's output."""

    return Handler


@pytest.fixture(scope="session")
def metrics_url() -> Iterator[str]:
    """http://127.0.0.1:PORT/metrics of a server that keeps serving every variant."""
    traffic = Traffic()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(traffic.metrics))
    listener = threading.Thread(target=server.serve_forever)
    traffic.start()
    listener.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    listener.join()
    server.server_close()
    traffic.stop()


@pytest.fixture
def idle_metrics() -> Metrics:
    """The metrics of a server that has just started."""
    idle = tuple(VariantStats(v.name, 0, 0, 0, 0) for v in VARIANTS)
    stats = EngineStats(alive=True, pool_bytes=1, variants=idle, steps=0)
    return Metrics("smol", VARIANTS, plan_id="0f1e2d", version="0.0", stats=lambda: stats)
