"""What hostile clients and operators meet: bad bodies, headers, keys, limits, leaving, draining."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.api.calls import (
    FULL,
    MODEL,
    PROMPT,
    complete,
    error_of,
    is_idle,
    succeeded,
    tokens_of,
    wait_until,
)
from tests.live import LiveServer, serve

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
JSON = {"Content-Type": "application/json"}
LONG = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True}
"""A request that takes minutes."""


# Bodies.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'"text"', id="a text"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"prompt": "\xff"}', id="not UTF-8"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="100,000 brackets"),
        pytest.param(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, id="50,000 braces"),
        pytest.param(b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", id="900 brackets"),
        pytest.param(b'{"n": ' + b"9" * 5000 + b"}", id="5,000 digits"),
        pytest.param(b'{"n": 1e999}', id="beyond a float"),
        pytest.param(b'{"model": 5, "user": 5, "n": "x"}', id="wrong types"),
        pytest.param(
            b"{" + b",".join(b'"f%d": 1' % i for i in range(1000)) + b"}", id="1,000 keys"
        ),
    ],
)
def test_bad_bodies_are_refused(http: httpx.Client, path: str, body: bytes) -> None:
    error = error_of(http.post(path, content=body, headers=JSON), 400)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "n"])
def test_numbers_that_json_does_not_have_are_refused(
    http: httpx.Client, field: str, number: str
) -> None:
    body = f'{{"prompt": "a", "{field}": {number}}}'
    assert error_of(http.post(PATHS[0], content=body, headers=JSON), 400)["param"] == field


def test_half_a_surrogate_pair_is_refused(http: httpx.Client) -> None:
    for path, body in (
        (PATHS[0], '{"prompt": "a\\ud800"}'),
        (PATHS[0], '{"prompt": ["b", "a\\ud800"]}'),
        (PATHS[0], '{"prompt": "a", "stop": "\\ud800"}'),
        (PATHS[0], '{"prompt": "a", "\\ud800": 1}'),
        (PATHS[1], '{"messages": [{"role": "user", "content": "a\\ud800"}]}'),
        (PATHS[2], '{"prompt": "a\\ud800"}'),
    ):
        error_of(http.post(path, content=body, headers=JSON), 400)
    whole = '{"prompt": "\\ud83c\\udf89", "max_tokens": 1}'
    assert http.post(PATHS[0], content=whole, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATHS[0], {"prompt": "a", "logit_bias": {f"x{i}": "y" for i in range(1000)}}),
        (PATHS[0], {"prompt": "a", "stop_token_ids": ["x" * 1000] * 100}),
        (PATHS[0], {"prompt": [0.5] * 100_000}),
        (PATHS[0], {"prompt": "a", "x" * 100_000: 1}),
        (PATHS[0], {"prompt": "a", "model": "x" * 100_000}),
        (PATHS[1], {"messages": [{"role": "x", "content": i, "y": 1} for i in range(1000)]}),
        (PATHS[3], {"tokens": ["x"] * 100_000}),
    ],
)
def test_errors_quote_little_of_what_was_wrong(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    started = time.monotonic()
    error_of(http.post(path, json=body), 400)
    assert time.monotonic() - started < 2


def test_a_body_that_is_not_declared_as_json_is_refused_with_advice(http: httpx.Client) -> None:
    response = http.post(PATHS[0], content=b'{"prompt": "a"}')
    assert "Content-Type: application/json" in error_of(response, 400)["message"]


def raw_answer(live: LiveServer, request: bytes) -> bytes:
    """Send bytes and return all that comes back until the server closes the connection."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_body_declared_too_large_is_refused_unread(live: LiveServer) -> None:
    answer = raw_answer(
        live,
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: 99999999999\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in answer
    assert b"x-request-id" in answer.lower()


def test_a_body_without_a_length_is_refused_once_it_is_too_large(http: httpx.Client) -> None:
    pieces = (b" " * (1 << 20) for _ in range(5))
    response = http.post(PATHS[0], content=pieces, headers=JSON)
    assert error_of(response, 413)["code"] == "request_too_large"


def test_unknown_paths_and_methods_are_refused(http: httpx.Client) -> None:
    assert "/v1/completions" in error_of(http.get("/v1/embeddings"), 404)["message"]
    assert error_of(http.get("/v1/completions"), 405)["message"].startswith("GET")
    error_of(http.delete("/v1/models"), 405)
    error_of(http.post("/health"), 405)


# Variants.


def with_headers(http: httpx.Client, values: list[str], **body: Any) -> httpx.Response:
    headers = [(b"X-Model-Variant", value.encode("latin-1")) for value in values]
    return http.post(PATHS[0], json={"prompt": PROMPT, "max_tokens": 1, **body}, headers=headers)


@pytest.mark.parametrize(
    ("values", "model", "variant"),
    [
        ([], None, "pruned"),
        ([], MODEL, "pruned"),
        (["FuLL"], None, "full"),
        (["light"], MODEL, "light"),
        (["light", "Light"], f"{MODEL}:light", "light"),
        ([], f"{MODEL}:full", "full"),
    ],
)
def test_a_variant_is_named_by_header_or_model(
    http: httpx.Client, values: list[str], model: str | None, variant: str
) -> None:
    response = with_headers(http, values, model=model)
    assert response.status_code == 200
    assert response.headers["x-model-variant"] == variant


@pytest.mark.parametrize("values", [["fast"], [""], ["full", "pruned"], ["full,pruned"], ["\xe9"]])
def test_an_unknown_variant_is_refused_with_the_choices(
    http: httpx.Client, values: list[str]
) -> None:
    error = error_of(with_headers(http, values), 400)
    assert "full, light, pruned" in error["message"]
    assert error["code"] == "unknown_variant"


def test_header_and_model_must_not_contradict(http: httpx.Client) -> None:
    error = error_of(with_headers(http, ["full"], model=f"{MODEL}:pruned"), 400)
    assert error["code"] == "variant_conflict"
    assert "'full'" in error["message"]
    assert "'pruned'" in error["message"]


@pytest.mark.parametrize("model", ["", "x", f"{MODEL}:", f"{MODEL}:fast", f"{MODEL}:full:full"])
def test_an_unknown_model_is_not_found(http: httpx.Client, model: str) -> None:
    error = error_of(with_headers(http, [], model=model), 404)
    assert error["code"] == "model_not_found"
    assert f"{MODEL}:full" in error["message"]


# What comes with every answer.


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)]
)
def test_a_usable_request_id_is_returned(http: httpx.Client, given: str, kept: bool) -> None:
    for path in ("/health", "/nowhere"):
        response = http.get(path, headers={"X-Request-Id": given})
        returned = response.headers.get_list("x-request-id")
        assert len(returned) == 1
        assert (returned[0] == given) == kept
        assert returned[0]


def test_request_ids_cannot_smuggle_control_characters(live: LiveServer) -> None:
    answer = raw_answer(
        live,
        b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        b"X-Request-Id: a\x1b[2J\tb\r\n\r\n",
    )
    assert b"\x1b" not in answer
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


def test_operators_get_answers(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ok"}
    assert set(http.get("/version").json()) == {"version"}
    assert http.get("/openapi.json").status_code == 200


@pytest.mark.parametrize("text", ["", "Hello world", "Ünïcödé 🥳\n\t", "<|im_start|>user\nHi"])
def test_tokenize_and_detokenize_are_inverse(http: httpx.Client, text: str) -> None:
    answer = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 8192
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_detokenize_refuses_tokens_that_do_not_exist(http: httpx.Client) -> None:
    for tokens in ([-1], [49152], [10**30], ["a"]):
        error = error_of(http.post("/detokenize", json={"tokens": tokens}), 400)
        assert error["param"].startswith("tokens")


def test_metrics_count_what_happened(http: httpx.Client, live: LiveServer) -> None:
    def counted() -> list[float]:
        finished = {"variant": "light", "finish_reason": "length"}
        return [
            live.metric("attndrop_requests_finished_total", **finished),
            live.metric("attndrop_prompt_tokens_total", variant="light"),
            live.metric("attndrop_generated_tokens_total", variant="light"),
            live.metric("attndrop_time_to_first_token_seconds_count", variant="light"),
            live.metric("attndrop_inter_token_latency_seconds_count", variant="light"),
            live.metric("attndrop_requests_refused_total", reason="invalid"),
        ]

    before = counted()
    light = {"X-Model-Variant": "light"}
    complete(http, light, max_tokens=3, ignore_eos=True)
    for bad in ({"n": 0}, {"max_tokens": 10**6}, {"model": "x"}):
        assert http.post(PATHS[0], json={"prompt": "a", **bad}).is_client_error
    error_of(http.post(PATHS[0], content=b"{", headers=JSON), 400)
    error_of(http.post(PATHS[0], content=b'"\xff"', headers=JSON), 400)
    error_of(http.post(PATHS[0], content=iter([b" " * (5 << 20)]), headers=JSON), 413)
    moved = [now - then for now, then in zip(counted(), before, strict=True)]
    assert moved == [1, len(tokens_of(http, PROMPT)), 3, 1, 2, 6]
    wait_until(lambda: is_idle(live), 3)


# Clients that leave.


def aborted(live: LiveServer) -> float:
    return live.metric("attndrop_requests_finished_total", variant="full", finish_reason="abort")


def test_leaving_in_the_middle_of_a_stream_frees_the_pages(
    http: httpx.Client, live: LiveServer
) -> None:
    before = aborted(live)
    body = {**LONG, "stream": True, "n": 2}
    with http.stream("POST", PATHS[0], json=body, headers=FULL) as response:
        pieces = response.iter_bytes()
        next(pieces)
        assert not is_idle(live)
    wait_until(lambda: is_idle(live), 10)
    assert aborted(live) == before + 2


def test_leaving_while_waiting_for_an_answer_frees_the_pages(live: LiveServer) -> None:
    before = aborted(live)
    for path, body in (
        (PATHS[0], LONG),
        (PATHS[1], {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True}),
    ):
        with live.client() as leaving, pytest.raises(httpx.ReadTimeout):
            leaving.post(path, json=body, headers=FULL, timeout=0.5)
        wait_until(lambda: is_idle(live), 10)
    assert aborted(live) == before + 2


# A server with keys and one place, which in the end drains.

KEYS = ("first-key", "second-key")
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    """A server with two keys that computes one request and queues two."""
    options = ["--dtype", "float32", "--max-running", "1", "--max-waiting", "2"]
    options += [f"--api-key={key}" for key in KEYS] + ["--cors-origin", ORIGIN]
    with serve(options) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(small: LiveServer) -> Iterator[httpx.Client]:
    with small.client(headers={"Authorization": f"Bearer {KEYS[0]}"}) as client:
        yield client


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic first-key", "first-key", "Bearer first-key2"]
)
def test_without_a_key_nothing_is_answered(small: LiveServer, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    with small.client(headers=headers) as client:
        for response in (
            client.get("/v1/models"),
            client.post(PATHS[0], json={"prompt": "a"}),
            client.post("/tokenize", json={"prompt": "a"}),
            client.get("/nowhere"),
        ):
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("header", [f"Bearer {KEYS[0]}", f"bearer {KEYS[1]}"])
def test_every_key_opens(small: LiveServer, header: str) -> None:
    with small.client(headers={"Authorization": header}) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200


def test_the_openai_client_raises_for_a_wrong_key(small: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert [model.id for model in client.with_options(api_key=KEYS[1]).models.list()]


def test_refusals_for_want_of_a_key_are_counted(small: LiveServer) -> None:
    before = small.metric("attndrop_requests_refused_total", reason="unauthorized")
    error_of(small.client().get("/v1/models"), 401)
    assert small.metric("attndrop_requests_refused_total", reason="unauthorized") == before + 1


def test_web_pages_of_allowed_origins_may_call(small: LiveServer, keyed: httpx.Client) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization, x-model-variant"
    with small.client() as client:
        preflight = client.options(PATHS[0], headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "x-model-variant" in preflight.headers["access-control-allow-headers"].lower()
        unauthorized = client.get("/v1/models", headers={"Origin": ORIGIN})
        assert unauthorized.headers["access-control-allow-origin"] == ORIGIN
    response = keyed.get("/v1/models", headers={"Origin": ORIGIN})
    exposed = response.headers["access-control-expose-headers"].lower()
    assert "x-model-variant" in exposed
    assert "x-request-id" in exposed
    other = keyed.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_full_queue_says_when_to_try_again(small: LiveServer, keyed: httpx.Client) -> None:
    body = {**LONG, "stream": True}
    with keyed.stream("POST", PATHS[0], json=body) as running:
        pieces = running.iter_bytes()
        next(pieces)
        with keyed.stream("POST", PATHS[0], json={**body, "n": 2}):
            wait_until(lambda: small.metric("attndrop_requests_waiting", variant="pruned") == 2, 5)
            response = keyed.post(PATHS[0], json={"prompt": PROMPT})
            assert error_of(response, 429)["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
    wait_until(lambda: is_idle(small), 3)
    assert succeeded(keyed.post(PATHS[0], json={"prompt": PROMPT, "max_tokens": 1}))


def test_draining_lets_running_requests_finish(small: LiveServer, keyed: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 48, "ignore_eos": True, "stream": True}
    with keyed.stream("POST", PATHS[0], json=body) as running:
        lines = running.iter_lines()
        next(lines)
        small.process.terminate()
        wait_until(lambda: keyed.get("/ready").status_code == 503, 5)
        assert keyed.get("/health").status_code == 200
        refused = keyed.post(PATHS[0], json={"prompt": PROMPT})
        assert error_of(refused, 503)["code"] == "draining"
        assert refused.headers["retry-after"]
        data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"
    assert small.process.wait(10) == 0


def test_what_outlasts_the_drain_timeout_is_told() -> None:
    with (
        serve(["--dtype", "float32", "--drain-timeout", "0.5"]) as server,
        server.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.post, PATHS[0], json=LONG)
        with client.stream("POST", PATHS[0], json={**LONG, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            wait_until(lambda: running_requests(server) == 2, 5)
            server.process.terminate()
            data = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(data[-1])["error"]["code"] == "draining"
        assert error_of(waiting.result(10), 503)["code"] == "draining"
        assert server.process.wait(10) == 0


def running_requests(server: LiveServer) -> float:
    return server.metric("attndrop_requests_running", variant="pruned")
