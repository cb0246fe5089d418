"""What the serving benchmark sends, reads and prints, and how it starts peers. No figure is held
against a time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import http_peers
from benchmarks.http_peers import MissingPeerError, PeerDiedError, Work, started, text_of, words_of
from benchmarks.load import Endpoint, Load, Measured, Timed, metric, ours, run_load, send
from benchmarks.serve import Row, prefill_table, serving_table
from pruning.loading import EMBEDDED_MODEL, checkpoint_folder

WORK = Work(EMBEDDED_MODEL, at_once=8, tokens=192)
METRICS = """# HELP x
attndrop_kv_cache_used_bytes{variant="full"} 2.5e+06
attndrop_kv_cache_used_bytes{variant="pruned"} 10.0
plain 3
"""


class Recorded:
    """A server that answers every request with the same bytes and keeps what it was sent."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.head = ""
        self.body: dict[str, object] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(self.head.lower().split("content-length: ")[1].split("\r\n")[0])
        self.body = json.loads(await reader.readexactly(length))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


def stream(*events: object) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in data) + b"0\r\n\r\n"


def piece(text: str) -> dict[str, object]:
    return {"choices": [{"text": text}]}


def sent_to(server: Recorded, endpoint: Endpoint, tokens: int) -> Timed:
    """Send one request to a recorded server, wherever it listens."""

    async def run() -> Timed:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        there = Endpoint(
            f"http://127.0.0.1:{port}", endpoint.headers, endpoint.body, endpoint.spelled
        )
        async with listening:
            return await send(there, [1, 2, 3], tokens)

    return asyncio.run(run())


def test_tokens_are_counted_by_usage_and_a_closing_event_is_no_piece() -> None:
    usage = {"choices": [{"text": ""}], "usage": {"completion_tokens": 2}}
    server = Recorded(stream(piece("a"), piece("b"), usage))
    timed = sent_to(server, ours("", "pruned"), 2)
    assert (len(timed.tokens), timed.generated, timed.cached_tokens) == (2, 2, 0)
    assert "X-Model-Variant: pruned" in server.head
    assert server.body["prompt"] == [1, 2, 3]
    assert server.body["ignore_eos"] is True


def test_several_tokens_may_come_in_one_event() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    timed = sent_to(Recorded(stream(piece("ab"), piece("c"), usage)), Endpoint(""), 3)
    assert (len(timed.tokens), timed.generated) == (2, 3)


def test_events_are_put_together_from_what_the_network_cut() -> None:
    answer = stream(piece("a"), piece("b"), {"choices": [], "usage": {"completion_tokens": 2}})

    class InParts(Recorded):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for place in range(0, len(answer), 7):
                writer.write(answer[place : place + 7])
                await asyncio.sleep(0.001)
            writer.close()

    timed = sent_to(InParts(answer), Endpoint(""), 2)
    assert timed.sent < timed.tokens[0] < timed.tokens[1]


def test_prompts_are_spelled_as_the_server_wants_them() -> None:
    server = Recorded(stream(piece("a"), {"choices": [], "usage": {"completion_tokens": 1}}))
    sent_to(server, Endpoint("", spelled=lambda tokens: "-".join(map(str, tokens))), 1)
    assert server.body["prompt"] == "1-2-3"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\nno such thing", "no such thing"),
        (stream({"error": {"message": "broke"}}), "broke"),
        (stream(piece("a"), {"choices": [], "usage": {"completion_tokens": 1}}), "1 tokens came"),
    ],
)
def test_a_wrong_answer_is_an_error(answer: bytes, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        sent_to(Recorded(answer), Endpoint(""), 2)


def test_a_load_is_sent_whole() -> None:
    async def run() -> Measured:
        answer = stream(piece("a"), {"choices": [], "usage": {"completion_tokens": 1}})
        listening = await asyncio.start_server(Recorded(answer).serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        async with listening:
            return await run_load(Endpoint(f"http://127.0.0.1:{port}"), Load(5, 2, 4, 1))

    measured = asyncio.run(run())
    assert len(measured.requests) == 5
    assert measured.peak_kv_bytes is None
    assert measured.inter_token(0.5) == 0.0


def test_metrics_are_found_by_name_and_label() -> None:
    assert ours("", "full").kv_bytes(METRICS) == 2.5e6
    assert metric(METRICS, "plain") == 3
    with pytest.raises(RuntimeError, match="no missing"):
        metric(METRICS, "missing")


def test_prompts_of_words_are_the_same_tokens_as_text() -> None:
    words = words_of(EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(EMBEDDED_MODEL))
    (prompt,) = Load(1, 1, 200, 1, tuple(words)).prompts()
    assert tokenizer(text_of(tokenizer, prompt))["input_ids"] == prompt
    odd = tokenizer.convert_tokens_to_ids(["\u0120", "\u0120", "a"])
    with pytest.raises(ValueError, match="not the same tokens"):
        text_of(tokenizer, odd)


def test_a_peer_that_is_not_installed_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http_peers, "ENGINES", tmp_path)
    for kind in ("llama.cpp", "vllm"):
        with pytest.raises(MissingPeerError, match="make peers"), started(kind, WORK):
            pass
    with (
        pytest.raises(MissingPeerError, match="GGUF"),
        started("llama.cpp", Work("some/model", 1, 8)),
    ):
        pass


def installed(folder: Path, environment: str, program: str, script: str) -> None:
    path = folder / environment / "bin" / program
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_peer_that_dies_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(http_peers, "ENGINES", tmp_path)
    installed(tmp_path, "llama-server", "llama-server", "echo no memory; exit 3")
    with pytest.raises(PeerDiedError, match="no memory"), started("llama.cpp", WORK):
        pass


def test_peers_compute_every_prompt_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(http_peers, "ENGINES", tmp_path)
    installed(tmp_path, "llama-server", "llama-server", "")
    installed(tmp_path, "vllm", "python", "")
    llama = http_peers.llama_cpp(WORK, 7000)
    assert {"--no-cache-prompt", "--parallel", "8", "7000"} <= set(llama.command)
    assert llama.command[llama.command.index("--ctx-size") + 1] == str(8 * 208)
    assert llama.endpoint.body["cache_prompt"] is False
    vllm = http_peers.vllm(WORK, 7001)
    assert {"--no-enable-prefix-caching", "bfloat16"} <= set(vllm.command)
    assert vllm.endpoint.kv_bytes("vllm:kv_cache_usage_perc 0.5") == 2**30


def row(who: str, speed: float) -> Row:
    return Row(who, 1, 128, 64, 0.1, 0.2, 0.01, 0.02, speed, speed, None)


def test_tables_hold_our_speed_over_theirs() -> None:
    rows = [row("full", 30.0), row("pruned", 60.0), row("llama.cpp", 20.0)]
    for table in (
        serving_table("", rows, ("full", "pruned")),
        prefill_table("", rows, ("full", "pruned")),
    ):
        found = {str(column.header): list(column.cells) for column in table.columns}
        assert found["full over it"] == ["1.00", "0.50", "1.50"]
        assert found["pruned over it"] == ["2.00", "1.00", "3.00"]
