"""Upstreams that fail in every way: no token is lost or sent twice, and clients are told."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest

from tests.api.calls import error_of
from tests.gateway.running import gateway, shown
from tests.gateway.scripted import TOKENS, scripted, text, wait_until

CHAT = "/v1/chat/completions"
PATHS = ("/v1/completions", CHAT)


def both(bad, good) -> str:
    return f"full={bad.url},{good.url}"


def complete(events) -> None:
    assert shown(events) == text()
    assert events[-1] == "[DONE]"
    assert not any("error" in event for event in events[:-1])


class TestBeforeTheFirstToken:
    """Another upstream takes over, and the client sees one whole answer."""

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize(
        "script",
        [
            {"dies_after": 0},
            {"hangs_after": 0},
            {"status": 500},
            {"status": 503},
            {"status": 429},
            {"error_after": 0},
            {"ends_after": 0},
        ],
        ids=str,
    )
    def test_streams(self, path, script):
        with scripted(**script) as bad, scripted() as good:
            with gateway(both(bad, good), silence_timeout=0.5) as front:
                for _ in range(6):
                    complete(front.events(path))
                assert bad.requests
                assert front.metric("attndrop_requests_finished_total", finish_reason="length") == 6

    @pytest.mark.parametrize("script", [{"dies_after": 0}, {"hangs_after": 0}, {"status": 500}])
    def test_whole_answers(self, script):
        with scripted(**script) as bad, scripted() as good:
            with gateway(both(bad, good), request_timeout=0.5) as front:
                for _ in range(6):
                    assert front.complete().json()["choices"][0]["text"] == text()
                assert bad.requests

    def test_who_speaks_is_said_once(self):
        """In chat, an event without tokens was passed on before the upstream died."""
        with scripted("bad", error_after=0) as bad, scripted("good") as good:
            with gateway(both(bad, good)) as front:
                for _ in range(4):
                    events = front.events(CHAT)
                    complete(events)
                    roles = [e["choices"][0]["delta"].get("role") for e in events[:-1]]
                    assert roles.count("assistant") == 1
                    assert len({e["id"] for e in events[:-1]}) == 1
                assert bad.requests

    def test_an_upstream_that_is_gone(self):
        with socket.socket() as closed, scripted() as good:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
            with gateway(f"full={url},{good.url}") as front:
                complete(front.events())

    def test_all_are_bad(self):
        with scripted(status=500) as one, scripted(dies_after=0) as other:
            with gateway(f"full={one.url},{other.url}") as front:
                answer = front.complete(stream=True)
                assert answer.status_code in (500, 502)  # either failure may be the last
                assert error_of(answer, answer.status_code)["message"]


class TestAfterTheFirstToken:
    """The stream ends with an error; no second upstream writes another text into it."""

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize(
        "script",
        [{"dies_after": 7}, {"hangs_after": 7}, {"error_after": 7}, {"ends_after": 7}],
        ids=str,
    )
    def test_the_client_is_told(self, path, script):
        with scripted(**script) as bad, scripted() as good:
            with gateway(both(bad, good), silence_timeout=0.5) as front:
                cut = 0
                for _ in range(6):
                    events = front.events(path)
                    if events[-1] == "[DONE]":
                        complete(events)
                        continue
                    cut += 1
                    assert shown(events) == text(7)
                    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
                assert cut == len(bad.requests) > 0
                assert (
                    front.metric("attndrop_requests_finished_total", finish_reason="error") == cut
                )

    def test_under_load_nothing_is_lost_or_repeated(self):
        """Upstreams die in mid-stream while others work; every answer is whole or a prefix."""
        with scripted(dies_after=13, pause=0.002) as bad, scripted(pause=0.002) as good:
            with gateway(both(bad, good)) as front:
                results: list[list[object]] = []
                threads = [
                    threading.Thread(target=lambda: results.append(front.events()))
                    for _ in range(24)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert len(results) == 24
                for events in results:
                    whole = events[-1] == "[DONE]"
                    assert shown(events) == (text() if whole else text(13))
                    assert whole != ("error" in events[-1])


class TestEjection:
    def test_a_broken_upstream_gets_no_more_requests_for_a_while(self):
        with scripted(dies_after=0) as bad, scripted() as good:
            with gateway(both(bad, good)) as front:
                for _ in range(20):
                    complete(front.events())
                assert len(bad.requests) <= 2
                assert front.metric("attndrop_upstream_up", upstream=bad.url) == 0
                assert front.metric("attndrop_upstream_failures_total", upstream=bad.url) >= 1

    def test_it_comes_back(self):
        with scripted(dies_after=0) as bad, scripted() as good:
            with gateway(both(bad, good)) as front:
                for _ in range(2):
                    complete(front.events())
                bad.script.dies_after = None
                seen = len(bad.requests)
                time.sleep(1.1)
                for _ in range(4):
                    complete(front.events())
                assert len(bad.requests) > seen

    def test_one_that_says_it_is_not_well(self):
        with scripted() as bad, scripted() as good, gateway(both(bad, good)) as front:
            bad.script.healthy = False
            wait_until(lambda: front.metric("attndrop_upstream_up", upstream=bad.url) == 0)
            for _ in range(4):
                complete(front.events())
            assert not bad.requests

    def test_none_is_left(self):
        with scripted() as only, gateway(f"full={only.url}") as front:
            assert front.http.get("/health").status_code == 200
            only.script.healthy = False
            wait_until(lambda: front.http.get("/health").status_code == 503)
            error = error_of(front.complete(), 503)
            assert error["code"] == "no_upstream"

    def test_the_clients_mistakes_are_not_the_upstreams(self):
        with scripted(status=400) as only, gateway(f"full={only.url}") as front:
            for _ in range(6):
                error = error_of(front.complete(stream=True), 400)
                assert (error["message"], error["code"]) == ("as scripted", None)
            assert front.http.get("/health").status_code == 200

    def test_what_would_fail_again_is_not_tried_again(self):
        with scripted(status=500, headers={"x-should-retry": "false"}) as one, scripted() as other:
            other.script = one.script
            with gateway(f"full={one.url},{other.url}") as front:
                assert front.complete().status_code == 500
                assert len(one.requests) + len(other.requests) == 1


class TestClientsThatLeave:
    @pytest.mark.parametrize("streams", [True, False])
    def test_upstream_is_told(self, streams):
        with scripted(hangs_after=3 if streams else 0) as slow:
            with gateway(f"full={slow.url}") as front:
                with httpx.Client(base_url=front.url, timeout=60) as client:
                    body = {"prompt": "x", "stream": streams}
                    request = client.build_request("POST", "/v1/completions", json=body)
                    if streams:
                        response = client.send(request, stream=True)
                        next(response.iter_raw())
                        response.close()
                    else:
                        with pytest.raises(httpx.ReadTimeout):
                            client.post("/v1/completions", json=body, timeout=0.3)
                wait_until(lambda: slow.disconnected == 1)
                wait_until(lambda: slow.open == 0)
                name = "attndrop_upstream_outstanding_requests"
                wait_until(lambda: front.metric(name, upstream=slow.url) == 0)
                finished = "attndrop_requests_finished_total"
                wait_until(lambda: front.metric(finished, finish_reason="abort") == 1)

    def test_a_client_that_does_not_read_holds_the_upstream_back(self):
        with scripted(padding=50_000, tokens=2000) as fast:
            with gateway(f"full={fast.url}") as front:
                with httpx.stream(
                    "POST",
                    f"{front.url}/v1/completions",
                    json={"prompt": "x", "stream": True},
                    timeout=60,
                ) as response:
                    next(response.iter_raw())
                    time.sleep(0.5)
                    held = fast.sent_bytes
                    time.sleep(0.5)
                    assert fast.sent_bytes == held < 50_000 * 1000
                wait_until(lambda: fast.disconnected == 1)


def test_what_a_shutdown_cuts_off_is_said():
    with scripted(hangs_after=3) as slow, gateway(f"full={slow.url}") as front:
        lines: list[str] = []

        def read() -> None:
            body = {"prompt": "x", "stream": True}
            with httpx.stream("POST", f"{front.url}/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    if line:
                        lines.append(line)

        reading = threading.Thread(target=read)
        reading.start()
        wait_until(lambda: len(lines) == 3)
        front.started.worker.stop()
        reading.join(10)
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "draining"
        assert len(lines) == 4


def test_a_shutdown_ends_whole_answers_too():
    with scripted(hangs_after=0) as slow, gateway(f"full={slow.url}") as front:
        found: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: found.append(front.complete()))
        asking.start()
        wait_until(lambda: slow.open == 1)
        front.started.worker.stop()
        asking.join(10)
        assert error_of(found[0], 503)["code"] == "draining"


def test_the_first_byte_is_passed_on_at_once():
    with scripted(pause=0.05, tokens=4) as server, gateway(f"full={server.url}") as front:
        late = []
        for _ in range(5):
            server.sent_at.clear()
            with httpx.stream(
                "POST", f"{front.url}/v1/completions", json={"prompt": "x", "stream": True}
            ) as response:
                arrived = [time.monotonic() for _ in response.iter_raw()]
            times = zip(arrived[: server.script.tokens], server.sent_at, strict=True)
            late.extend(got - sent for got, sent in times)
        assert sorted(late)[len(late) // 2] < 0.005
        assert server.script.tokens < TOKENS
