"""Which variant and which upstream a request gets, and what the settings refuse."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections import Counter

import pytest
from pydantic import ValidationError

from server.gateway.routing import Split
from server.gateway.scrape import read_usage
from server.gateway.settings import GatewaySettings
from server.gateway.sse import Event
from server.gateway.start import GatewayError, start_gateway
from server.gateway.upstream import Agreement, Identity, Pool, Upstream
from tests.api.calls import error_of
from tests.gateway.running import gateway, shown
from tests.gateway.scripted import VLLM_METRICS, scripted, text


class TestSplit:
    def test_shares(self):
        split = Split({"pruned": 90, "full": 10})
        chosen = Counter(split.choose(None) for _ in range(5000))
        assert chosen["full"] / 5000 == pytest.approx(0.1, abs=0.02)

    def test_keys_stick_and_spread(self):
        split = Split({"pruned": 90, "full": 10})
        first = {f"user-{i}": split.choose(f"user-{i}") for i in range(2000)}
        assert all(split.choose(key) == variant for key, variant in first.items())
        assert Counter(first.values())["full"] / 2000 == pytest.approx(0.1, abs=0.02)

    def test_more_weight_moves_only_who_must_move(self):
        before, after = Split({"full": 10, "pruned": 90}), Split({"full": 20, "pruned": 80})
        moved = [key for key in map(str, range(2000)) if before.choose(key) != after.choose(key)]
        assert all(before.choose(key) == "pruned" for key in moved)

    def test_no_weight_no_request(self):
        split = Split({"pruned": 1, "full": 0})
        assert {split.choose(str(i)) for i in range(200)} == {"pruned"}

    def test_in_the_gateway(self):
        with scripted("f") as full, scripted("p") as pruned:
            upstreams = (f"full={full.url}", f"pruned={pruned.url}")
            with gateway(*upstreams, split=("pruned=50", "full=50")) as front:
                for user in map(str, range(20)):
                    seen = {
                        front.complete(headers={"X-Session-Id": user}).headers["x-model-variant"]
                        for _ in range(2)
                    }
                    assert len(seen) == 1
                assert full.requests
                assert pruned.requests
                count = len(full.requests)
                named = front.complete(headers={"X-Model-Variant": "full"})
                assert named.headers["x-model-variant"] == "full"
                assert len(full.requests) == count + 1


class TestUpstreams:
    def test_their_own_name_of_the_model_is_used_there_and_the_clients_here(self):
        with scripted("/models/pruned-x") as server:
            with gateway(f"pruned={server.url}", model_name="x") as front:
                assert front.complete(model="x:pruned").json()["model"] == "x:pruned"
                events = front.events()
                assert {e["model"] for e in events if e != "[DONE]"} == {"x"}
                assert {request["model"] for request in server.requests} == {"/models/pruned-x"}

    def test_what_is_passed_on(self):
        with scripted() as server:
            with gateway(f"full={server.url}", upstream_api_key="inner", api_key=("k",)) as front:
                front.complete(
                    headers={"Authorization": "Bearer k", "X-Request-Id": "r", "traceparent": "t"}
                )
                (headers,) = server.request_headers
                assert headers["authorization"] == "Bearer inner"
                assert (headers["x-request-id"], headers["traceparent"]) == ("r", "t")
                assert "x-model-variant" not in headers

    def test_over_tls(self, tmp_path, monkeypatch):
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("openssl is not on PATH; it makes the certificate")
        key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
        made = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=upstream"]
        files = ["-keyout", key, "-out", certificate, "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([openssl, "req", *made, *files], check=True, capture_output=True)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
        with scripted(tls=tls) as server:
            given = f"full={server.url}"
            with pytest.raises(GatewayError):
                start_gateway(GatewaySettings(upstream=(given,), start_timeout=0))
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            with gateway(given) as front:
                for _ in range(2):
                    assert shown(front.events()) == text()

    def test_usage_is_counted_and_only_shown_where_asked_for(self):
        with scripted() as server, gateway(f"full={server.url}") as front:
            assert all("usage" not in event for event in front.events()[:-1])
            shown = front.events(stream_options={"include_usage": True})[-2]
            assert (shown["choices"], shown["usage"]["prompt_tokens"]) == ([], 5)
            assert front.metric("attndrop_generated_tokens_total", variant="full") == 40
            assert front.metric("attndrop_prompt_tokens_total", variant="full") == 10
            count = "attndrop_inter_token_latency_seconds_count"
            assert front.metric(count, variant="full") == 38

    def test_the_one_with_the_fewest_requests_is_next(self):
        with scripted(pause=0.01) as slow, scripted() as fast:
            with gateway(f"full={slow.url},{fast.url}") as front:
                threads = [threading.Thread(target=front.events) for _ in range(6)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                for _ in range(6):
                    front.events()
                assert len(slow.requests) <= len(fast.requests)

    def test_turns_are_taken_and_the_unavailable_left_out(self):
        upstreams = [Upstream(f"http://{i}", Identity("m", 1, {}), True) for i in range(3)]
        pool = Pool("full", upstreams)
        picked = Counter(pool.pick(()).url for _ in range(30))
        assert set(picked.values()) == {10}
        upstreams[0].reachable = False
        upstreams[1].failed(connection=True)
        assert pool.pick(()) is upstreams[2]
        assert pool.pick({upstreams[2]}) is None
        for _ in range(2):
            upstreams[2].failed(connection=False)
            assert upstreams[2].available
        upstreams[2].failed(connection=False)
        assert not pool.alive


def test_servers_of_one_pool_must_drop_the_same_layers():
    def identity(*dropped: int) -> Identity:
        return Identity("m", 1, {"pruned": {"variant": {"dropped_layers": list(dropped)}}})

    agreement = Agreement()
    agreement.check(identity(3, 4))
    agreement.check(identity(3, 4))
    agreement.check(Identity("any other server", 1, {}))
    with pytest.raises(ValueError, match=r"start all with the same --model and --plan"):
        agreement.check(identity(3, 5))


@pytest.mark.parametrize(
    ("choice", "bears"),
    [
        ({"text": "", "finish_reason": None}, False),
        ({"text": "a"}, True),
        ({"text": "", "finish_reason": "stop"}, True),
        ({"text": "", "logprobs": {"tokens": ["\ufffd"]}}, True),
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"content": "a"}}, True),
        ({"delta": {"tool_calls": [{"index": 0}]}}, True),
        ({"delta": {}}, False),
    ],
)
def test_what_counts_as_shown(choice, bears):
    assert Event(b"", {"choices": [choice]}).bears_tokens is bears


class TestUsage:
    def test_of_vllm(self):
        assert read_usage(VLLM_METRICS, "pruned") == {
            "pruned": {
                "requests_running": 3,
                "requests_waiting": 2,
                "preemptions_total": 7,
                "prefix_cache_queries_tokens_total": 100,
                "prefix_cache_hit_tokens_total": 40,
                "variant_capacity_tokens": 1024,
                "variant_kv_bytes_per_token": 1000,
                "kv_cache_used_bytes": 256_000,
            },
            "": {"kv_cache_utilization_ratio": 0.25, "kv_cache_capacity_bytes": 1_024_000},
        }

    def test_without_a_known_size_no_bytes_are_made_up(self):
        text = VLLM_METRICS.replace(
            'kv_cache_memory_bytes="1024000"', 'kv_cache_memory_bytes="None"'
        )
        usage = read_usage(text, "full")
        assert "kv_cache_used_bytes" not in usage["full"]
        assert usage[""] == {"kv_cache_utilization_ratio": 0.25}
        assert usage["full"]["variant_capacity_tokens"] == 1024

    def test_in_the_gateways_metrics(self):
        with scripted() as one, scripted() as other:
            with gateway(f"full={one.url},{other.url}") as front:
                assert front.metric("attndrop_kv_cache_used_bytes", variant="full") == 512_000
                assert front.metric("attndrop_kv_cache_utilization_ratio") == 0.25
                assert front.metric("attndrop_requests_running", variant="full") == 6
                assert front.metric("attndrop_engine_up") == 1
                text = front.http.get("/metrics").text
                assert "attndrop_engine_steps_total{" not in text


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "--upstream is required"),
            ({"upstream": ("full",)}, "must list URLs like"),
            ({"upstream": ("full=ftp://x",)}, "must list URLs like"),
            ({"upstream": ("A b=http://x",)}, r"must be VARIANT=URL,URL"),
            ({"upstream": ("*=http://x", "full=http://y")}, "give no other beside it"),
            ({"upstream": ("full=http://x",), "split": ("full",)}, "VARIANT=WEIGHT"),
            ({"upstream": ("full=http://x",), "split": ("full=0",)}, "a weight above 0"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(ValidationError, match=message):
            GatewaySettings(**settings)

    def test_upstreams_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("ATTNDROP_GATEWAY_UPSTREAM", "full=http://a,http://b pruned=http://c/")
        monkeypatch.setenv("ATTNDROP_GATEWAY_SPLIT", "pruned=90,full=10")
        settings = GatewaySettings()
        assert settings.pools() == {"full": ("http://a", "http://b"), "pruned": ("http://c",)}
        assert settings.weights() == {"pruned": 90, "full": 10}

    def test_upstreams_that_do_not_answer(self):
        settings = GatewaySettings(upstream=("full=http://127.0.0.1:1",), start_timeout=0)
        with pytest.raises(GatewayError, match=r"no upstream of full answered within 0 s \(http"):
            start_gateway(settings)

    def test_what_does_not_fit_together(self):
        with scripted() as server:
            for given, message in (
                ({"upstream": (f"*={server.url}",)}, "is no attndrop server; name its variant"),
                (
                    {"upstream": (f"full={server.url}",), "split": ("pruned=1",)},
                    "there is no variant 'pruned', only full",
                ),
            ):
                with pytest.raises(GatewayError, match=message):
                    start_gateway(GatewaySettings(**given))

    def test_an_unknown_variant_is_refused(self):
        with scripted() as server, gateway(f"full={server.url}") as front:
            error = error_of(front.complete(headers={"X-Model-Variant": "pruned"}), 400)
            assert error["code"] == "unknown_variant"
