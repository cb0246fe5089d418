"""The gateway in front of two real vLLM servers: the base model and its export.

Run by `make test-export`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from benchmarks.engines import table
from benchmarks.engines.running import VllmServer, vllm_server
from pruning.loading import EMBEDDED_MODEL, checkpoint_folder
from tests.api.calls import error_of
from tests.gateway.running import Gateway, gateway, shown
from tests.gateway.scripted import wait_until

pytestmark = pytest.mark.engines

BODY = {"prompt": table.TEXTS[1], "temperature": 0, "max_tokens": table.TOKENS, "ignore_eos": True}
PRUNED, FULL = ({"X-Model-Variant": name} for name in ("pruned", "full"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> table.Subject:
    return table.embedded(tmp_path_factory.mktemp("embedded") / "model")


@pytest.fixture(scope="module")
def servers(subject) -> Iterator[dict[str, VllmServer]]:
    full = str(checkpoint_folder(EMBEDDED_MODEL))
    pruned = subject.exported("nemotron-nas", table.DROPPED)
    with vllm_server(full, "base") as one, vllm_server(pruned, "exported") as other:
        yield {"full": one, "pruned": other}


@pytest.fixture(scope="module")
def front(servers) -> Iterator[Gateway]:
    upstreams = [f"{name}={server.url}" for name, server in servers.items()]
    with gateway(*upstreams, model_name="smol", health_interval=1) as running:
        yield running


@pytest.mark.parametrize("variant", ["pruned", "full"])
def test_the_same_text_as_our_own_server(front, subject, variant):
    expected = "".join(getattr(subject, variant)[1])
    answer = front.complete(headers={"X-Model-Variant": variant}, **BODY)
    assert answer.json()["choices"][0]["text"] == expected
    assert (answer.json()["model"], answer.headers["x-model-variant"]) == ("smol", variant)
    assert shown(front.events(**BODY, model=f"smol:{variant}")) == expected


def test_the_official_client_in_a_chat(front):
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="any")
    messages = [{"role": "user", "content": "Name three rivers."}]
    stream = client.chat.completions.create(
        model="smol:pruned", messages=messages, max_tokens=8, temperature=0, stream=True
    )
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {"smol:pruned"}
    assert chunks[0].choices[0].delta.role == "assistant"
    whole = client.chat.completions.create(
        model="smol:pruned", messages=messages, max_tokens=8, temperature=0
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_errors_in_our_form(front):
    error = error_of(front.complete(**{**BODY, "max_tokens": 100_000}), 400)
    assert "100000" in error["message"]
    error_of(front.complete(**{**BODY, "temperature": -1}), 400)


def test_kv_memory_of_the_variants(front):
    def of(name: str, variant: str) -> float:
        return front.metric(f"attndrop_{name}", variant=variant)

    wait_until(lambda: "kv_cache_used_bytes{" in front.http.get("/metrics").text, 20)
    for name, expected in (
        ("variant_kv_bytes_per_token", 22 / 30),
        ("variant_capacity_tokens", 30 / 22),
    ):
        assert of(name, "pruned") / of(name, "full") == pytest.approx(expected, rel=0.01)
    assert front.metric("attndrop_kv_cache_capacity_bytes") == 2 * 2**30
    assert of("time_to_first_token_seconds_count", "pruned") >= 2


def test_a_server_that_is_lost_in_mid_stream(front, servers, subject):
    """The last test of this file: afterwards there is no pruned server."""
    expected = shown(front.events(**{**BODY, "max_tokens": 300}, headers=PRUNED))
    request = front.http.build_request(
        "POST",
        "/v1/completions",
        json={**BODY, "max_tokens": 300, "stream": True},
        headers=PRUNED,
    )
    response = front.http.send(request, stream=True)
    received = response.iter_raw()
    begin = b"".join(next(received) for _ in range(5))
    servers["pruned"].kill()
    raw = begin + b"".join(received)
    *frames, last, rest = raw.decode().split("\n\n")
    assert rest == ""
    assert '"error"' in last
    texts = [frame.removeprefix("data: ") for frame in frames]
    seen = shown([json.loads(text) for text in texts])
    assert seen
    assert expected.startswith(seen)
    wait_until(lambda: front.complete(headers=PRUNED, **BODY).status_code == 503, 10)
    assert front.complete(headers=FULL, **BODY).status_code == 200
