"""A gateway in this process, on a real port."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from server.gateway.settings import GatewaySettings
from server.gateway.start import StartedGateway, start_gateway


class Gateway:
    """Where the gateway is, and what it is made of."""

    def __init__(self, url: str, started: StartedGateway) -> None:
        self.url = url
        self.started = started
        self.http = httpx.Client(base_url=url, timeout=60)

    def complete(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "x", **body}, headers=headers)

    def events(
        self, path: str = "/v1/completions", headers: dict[str, str] | None = None, **body: Any
    ) -> list[Any]:
        """Return the events of a stream, with "[DONE]" where it is."""
        chat = {"messages": [{"role": "user", "content": "x"}]}
        prompt = chat if "chat" in path else {"prompt": "x"}
        asked = {**prompt, "stream": True, **body}
        response = self.http.post(path, json=asked, headers=headers)
        assert response.status_code == 200, response.text
        *frames, rest = response.text.split("\n\n")
        assert rest == ""
        data = [frame.removeprefix("data: ") for frame in frames]
        return [each if each == "[DONE]" else json.loads(each) for each in data]

    def metric(self, name: str, **labels: str) -> float:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(w in line for w in wanted):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(f"{name} {labels}")


def shown(events: list[Any]) -> str:
    """Return the text that a stream's events show."""
    choices = [c for e in events if e != "[DONE]" for c in e.get("choices", ())]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


@contextmanager
def gateway(*upstreams: str, **settings: Any) -> Iterator[Gateway]:
    """Run a gateway in front of `upstreams`, each as for --upstream."""
    quick = {"health_interval": 0.1, "start_timeout": 5, **settings}
    started = start_gateway(GatewaySettings(upstream=upstreams, **quick))
    server = uvicorn.Server(
        uvicorn.Config(started.app, port=0, log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    started.worker.start()
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Gateway(f"http://127.0.0.1:{port}", started)
    try:
        yield running
    finally:
        running.http.close()
        started.worker.stop()
        server.should_exit = True
        thread.join(10)
