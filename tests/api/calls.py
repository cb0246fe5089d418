"""How the tests of the API call it over plain HTTP, and what they expect of every error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.live import LiveServer

MODEL = "SmolLM2-135M-Instruct"
PROMPT = "The capital of France is"
FULL = {"X-Model-Variant": "full"}

Json = dict[str, Any]


def complete(http: httpx.Client, headers: dict[str, str] | None = None, **body: Any) -> Json:
    """Return the answer of /v1/completions, which must be a success."""
    asked = {"prompt": PROMPT, "temperature": 0, **body}
    return succeeded(http.post("/v1/completions", json=asked, headers=headers))


def chat(http: httpx.Client, headers: dict[str, str] | None = None, **body: Any) -> Json:
    """Return the answer of /v1/chat/completions, which must be a success."""
    asked = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, **body}
    return succeeded(http.post("/v1/chat/completions", json=asked, headers=headers))


def succeeded(response: httpx.Response) -> Json:
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def stream(
    http: httpx.Client,
    path: str = "/v1/completions",
    headers: dict[str, str] | None = None,
    **body: Any,
) -> list[Json]:
    """Return the events of a stream, whose framing must be right to the byte."""
    prompt = {"prompt": PROMPT} if path == "/v1/completions" else {}
    asked = {**prompt, **{"temperature": 0, "stream": True}, **body}
    response = http.post(path, json=asked, headers=headers)
    assert response.status_code == 200, response.text
    return events(response.content)


def events(body: bytes) -> list[Json]:
    *frames, rest = body.split(b"\n\n")
    assert rest == b""
    assert frames.pop() == b"data: [DONE]"
    assert all(frame.startswith(b"data: {") and b"\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames]


def error_of(response: httpx.Response, status: int) -> Json:
    """Return the error of an answer, which must have OpenAI's shape."""
    assert response.status_code == status, response.text
    assert len(response.content) < 10_000
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error: Json = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert error["code"] is None or isinstance(error["code"], str)
    return error


def tokens_of(http: httpx.Client, text: str) -> list[int]:
    return http.post("/tokenize", json={"prompt": text}).json()["tokens"]  # type: ignore[no-any-return]


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so, and fail if it is not so in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"this was not so within {seconds} s"
        time.sleep(0.02)


def is_idle(server: LiveServer) -> bool:
    """Whether no request runs or waits and no page is in use."""
    names = ("requests_running", "requests_waiting", "kv_cache_used_bytes")
    lines = server.client().get("/metrics").text.splitlines()
    samples = [line for line in lines if line.startswith(tuple(f"attndrop_{n}{{" for n in names))]
    assert len(samples) >= 2 * len(names)
    return all(float(line.rsplit(" ", 1)[1]) == 0 for line in samples)
