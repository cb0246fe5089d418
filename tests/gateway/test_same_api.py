"""The gateway in front of two real servers: the same API as theirs, and nothing lost on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.api.calls import error_of, events
from tests.export.tiny_checkpoints import save_checkpoint
from tests.gateway.running import Gateway, gateway, shown
from tests.gateway.scripted import wait_until
from tests.live import LiveServer, serve

PROMPT = "The quick brown fox"
BODY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "x"}]
CHAT = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[tuple[LiveServer, LiveServer]]:
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    options = ["--model", str(folder), "--drop", "3", "--dtype", "float32"]
    with serve(options) as one, serve(options) as other:
        yield one, other


@pytest.fixture(scope="module")
def front(servers) -> Iterator[Gateway]:
    urls = ",".join(server.url for server in servers)
    with gateway(f"*={urls}", health_interval=0.2) as running:
        yield running


@pytest.fixture
def direct(servers) -> Iterator[httpx.Client]:
    with servers[0].client() as client:
        yield client


def without_ids(content):
    return {key: value for key, value in content.items() if key not in ("id", "created")}


@pytest.mark.parametrize("variant", ["full", "pruned"])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)]
)
class TestAnswers:
    def test_whole(self, front, direct, path, body, variant):
        headers = {"X-Model-Variant": variant}
        through = front.http.post(path, json={**body, "n": 2, "seed": 1}, headers=headers)
        straight = direct.post(path, json={**body, "n": 2, "seed": 1}, headers=headers)
        assert through.status_code == 200
        assert without_ids(through.json()) == without_ids(straight.json())
        assert through.headers["x-model-variant"] == variant

    @pytest.mark.parametrize("usage", [None, {"include_usage": True}])
    def test_streams(self, front, direct, path, body, variant, usage):
        asked = {**body, "model": f"tiny:{variant}", "stream": True}
        if usage:
            asked["stream_options"] = usage
        through = events(front.http.post(path, json=asked).content)
        straight = events(direct.post(path, json=asked).content)
        assert [*map(without_ids, through)] == [*map(without_ids, straight)]
        assert len({(event["id"], event["created"]) for event in through}) == 1


class TestEverythingElse:
    @pytest.mark.parametrize(
        ("body", "headers"),
        [
            ({"model": "other"}, {}),
            ({"model": "tiny:pruned"}, {"X-Model-Variant": "full"}),
            ({}, {"X-Model-Variant": "best"}),
            ({"max_tokens": -1}, {}),
            ({"flavour": 1}, {}),
            ({"max_tokens": 10_000}, {}),
            ({"stream_options": {"include_usage": True}}, {}),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_errors(self, front, direct, body, headers, stream):
        if "stream_options" in body and stream:
            pytest.skip("that is allowed")
        asked = {**BODY, **body, "stream": stream}
        through, straight = (
            client.post("/v1/completions", json=asked, headers=headers)
            for client in (front.http, direct)
        )
        assert error_of(through, through.status_code) == error_of(straight, straight.status_code)
        assert through.status_code == straight.status_code

    def test_bodies_that_are_no_json(self, front):
        for raw in (b"{", b"[]", b'{"stream": 3}', b'{"model": 3}'):
            error_of(front.http.post("/v1/completions", content=raw), 400)
        error_of(front.http.post("/v1/completions", content=b"x" * (5 << 20)), 413)
        error_of(front.http.get("/v1/nothing"), 404)

    def test_models(self, front, direct):
        def of(client):
            entries = client.get("/v1/models").json()["data"]
            return [{k: v for k, v in entry.items() if k != "created"} for entry in entries]

        assert of(front.http) == of(direct)

    def test_tokenizer(self, front, direct):
        for client in (front.http, direct):
            tokens = client.post("/tokenize", json={"prompt": PROMPT}).json()
            assert tokens["count"] == len(tokens["tokens"]) > 3
            text = client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
            assert text == {"prompt": PROMPT}
        info = [client.get("/tokenizer_info").json() for client in (front.http, direct)]
        assert info[0] == info[1]

    def test_request_ids(self, front):
        answer = front.http.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
        assert len(front.http.post("/v1/completions", json=BODY).headers["x-request-id"]) == 32

    def test_the_official_client(self, front):
        client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="any")
        stream = client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=8,
            stream=True,
            extra_headers={"X-Model-Variant": "pruned"},
        )
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="nothing", prompt="x")

    def test_operations(self, front):
        for path in ("/health", "/ready"):
            assert front.http.get(path).json() == {"status": "ok"}
        assert front.http.get("/version").status_code == 200

    def test_keys(self, servers):
        with gateway(f"*={servers[0].url}", api_key=("secret",)) as front:
            error_of(front.complete(**BODY), 401)
            bearer = {"Authorization": "Bearer secret"}
            assert front.complete(headers=bearer, **BODY).status_code == 200


class TestBehind:
    def test_both_servers_work(self, front, servers):
        for _ in range(8):
            front.complete(**BODY)
        counts = [
            server.metric(
                "attndrop_requests_finished_total", variant="pruned", finish_reason="length"
            )
            for server in servers
        ]
        assert min(counts) >= 4

    def test_metrics_of_requests_and_of_the_upstreams(self, front, servers):
        name = "attndrop_time_to_first_token_seconds_count"
        before = front.metric(name, variant="full")
        tokens = front.metric("attndrop_generated_tokens_total", variant="full")
        front.events(**BODY, headers={"X-Model-Variant": "full"})
        assert front.metric(name, variant="full") == before + 1
        assert front.metric("attndrop_generated_tokens_total", variant="full") == tokens + 12
        for metric, labels in (
            ("attndrop_variant_kv_bytes_per_token", {"variant": "pruned"}),
            ("attndrop_variant_attention_layers", {"variant": "pruned"}),
        ):
            assert front.metric(metric, **labels) == servers[0].metric(metric, **labels)
        name = "attndrop_kv_cache_capacity_bytes"
        assert front.metric(name) == sum(server.metric(name) for server in servers)
        assert front.metric("attndrop_kv_cache_used_bytes", variant="full") >= 0
        assert front.metric("attndrop_plan_info") == 1

    def test_a_client_that_leaves_frees_the_server(self, front, servers):
        def running() -> float:
            return sum(
                server.metric("attndrop_requests_running", variant="pruned") for server in servers
            )

        body = {**BODY, "max_tokens": 200, "stream": True, "n": 8}
        with httpx.stream("POST", f"{front.url}/v1/completions", json=body) as response:
            next(response.iter_raw())
        wait_until(lambda: running() == 0)


def test_the_command(servers):
    """In a process of its own; SIGTERM lets requests finish."""
    with serve(["--upstream", f"*={servers[0].url}"], command="gateway") as running:
        with running.client() as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
        started = time.monotonic()
        assert running.terminate() == 0
        assert time.monotonic() - started < 10


def test_a_server_that_is_killed(servers, front):
    """Streams on it end with an error or whole; then all requests go to the other.

    The last test of this file: afterwards there is one server.
    """
    body = {**BODY, "max_tokens": 200}
    expected = shown(front.events(**body))
    streams = []
    for _ in range(4):
        asked = {**body, "stream": True}
        request = front.http.build_request("POST", "/v1/completions", json=asked)
        streams.append(front.http.send(request, stream=True))
    servers[1].process.kill()
    cut = 0
    for response in streams:
        assert response.status_code == 200
        *frames, last, rest = response.read().split(b"\n\n")
        assert rest == b""
        seen = shown(events(b"\n\n".join([*frames, b"data: [DONE]\n\n"])))
        whole = last == b"data: [DONE]"
        assert seen == expected if whole else expected.startswith(seen) and b'"error"' in last
        cut += not whole
    assert cut <= 2
    for _ in range(4):
        assert shown(front.events(**body)) == expected
