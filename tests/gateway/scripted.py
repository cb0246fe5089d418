"""An OpenAI-compatible server over real sockets that does what a script says: well or badly.

It generates " 0", " 1", " 2", ... so that a lost or repeated token shows in the text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOKENS = 20

VLLM_METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:num_preemptions_total{engine="0",model_name="m"} 7.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 40.0
vllm:cache_config_info{block_size="128",engine="0",kv_cache_memory_bytes="1024000",\
kv_cache_size_tokens="1024",num_gpu_blocks="8"} 1.0
"""


@dataclass
class Script:
    """How a server behaves."""

    status: int = 200
    dies_after: int | None = None
    """Resets the connection after so many tokens."""
    hangs_after: int | None = None
    """Sends nothing more after so many tokens; before the first, not even a status."""
    error_after: int | None = None
    """Sends an error event after so many tokens."""
    ends_after: int | None = None
    """Ends the stream, as if it were complete, but without [DONE]."""
    pause: float = 0.0
    """Seconds between tokens."""
    padding: int = 0
    """Characters added to every token, to fill buffers."""
    healthy: bool = True
    tokens: int = TOKENS
    headers: dict[str, str] = field(default_factory=dict)


class ScriptedServer:
    """A server in a thread of its own."""

    def __init__(self, name: str, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self.name = name
        self.tls = tls
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.request_headers: list[dict[str, str]] = []
        self.sent_at: list[float] = []
        self.sent_bytes = 0
        self.disconnected = 0
        self.open = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(5)

    @property
    def url(self) -> str:
        scheme = "https" if self.tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        listening = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 22, ssl=self.tls)
        )
        self.port = listening.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        listening.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                lines = [line.split(": ", 1) for line in head.split("\r\n")[1:] if line]
                headers = {name.lower(): value for name, value in lines}
                raw = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer(method, path, headers, raw, reader, writer)
        writer.close()

    async def _answer(self, method, path, headers, raw, reader, writer) -> None:
        if method == "GET":
            await self._get(path, writer)
            return
        body = json.loads(raw)
        self.requests.append(body)
        self.request_headers.append(headers)
        self.open += 1
        try:
            if self.script.hangs_after == 0:
                await self._hang(reader)
            elif self.script.dies_after == 0:
                self._die(writer)
            elif self.script.status != 200:
                await self._error(writer)
            elif body.get("stream"):
                await self._stream(path, body, reader, writer)
            else:
                await self._whole(body, writer)
        finally:
            self.open -= 1

    async def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            content = json.dumps({"data": [{"id": self.name, "max_model_len": 512}]})
        elif path == "/metrics":
            content = VLLM_METRICS
        else:
            content = "{}"
        status = 200 if self.script.healthy else 503
        await self._send_whole(writer, status, content)

    async def _error(self, writer: asyncio.StreamWriter) -> None:
        error = {"message": "as scripted", "type": "scripted", "code": self.script.status}
        await self._send_whole(writer, self.script.status, json.dumps({"error": error}))

    async def _whole(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.script.pause)
        content = {
            "id": f"cmpl-{self.name}",
            "object": "text_completion",
            "model": body["model"],
            "choices": [{"index": 0, "text": text(self.script.tokens), "finish_reason": "length"}],
            "usage": self._usage(),
        }
        await self._send_whole(writer, 200, json.dumps(content))

    async def _send_whole(self, writer: asyncio.StreamWriter, status: int, content: str) -> None:
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.script.headers.items())
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}"
            f"Content-Length: {len(content.encode())}\r\n\r\n{content}".encode()
        )
        await writer.drain()

    async def _stream(self, path, body, reader, writer) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chat = path.endswith("chat/completions")
        gone = asyncio.ensure_future(reader.read(1))
        try:
            async for event in self._events(chat, body):
                if isinstance(event, str):
                    if event == "hang":
                        await gone
                        self.disconnected += 1
                    else:
                        self._die(writer)
                    return
                await self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
                if gone.done():
                    raise ConnectionResetError
            if self.script.ends_after is None:
                await self._chunk(writer, b"data: [DONE]\n\n")
            # Before the end, after which the next request may come on this connection.
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        except ConnectionError:
            self.disconnected += 1
            raise
        finally:
            gone.cancel()

    async def _events(self, chat: bool, body: dict[str, Any]) -> AsyncIterator[Any]:
        script = self.script
        base = {"id": f"cmpl-{self.name}", "created": 1, "model": body["model"]}
        if chat:
            yield {**base, "choices": [_choice(chat, None, None)]}
        for index in range(script.tokens):
            if index == script.dies_after:
                yield "die"
            if index == script.hangs_after:
                yield "hang"
            if index == script.error_after:
                yield {"error": {"message": "as scripted", "type": "scripted", "code": None}}
            if index == script.ends_after:
                return
            await asyncio.sleep(script.pause)
            finish = "length" if index == script.tokens - 1 else None
            self.sent_at.append(time.monotonic())
            piece = f" {index}" + "x" * script.padding
            yield {**base, "choices": [_choice(chat, piece, finish)]}
        if (body.get("stream_options") or {}).get("include_usage"):
            yield {**base, "choices": [], "usage": self._usage()}

    async def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.sent_bytes += len(data)
        await writer.drain()

    async def _hang(self, reader: asyncio.StreamReader) -> None:
        await reader.read(1)
        self.disconnected += 1
        raise ConnectionResetError

    def _die(self, writer: asyncio.StreamWriter) -> None:
        """Close the connection as a killed process's kernel does: with a reset."""
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        raise ConnectionResetError

    def _usage(self) -> dict[str, int]:
        tokens = self.script.tokens
        return {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}


def _choice(chat: bool, piece: str | None, finish: str | None) -> dict[str, Any]:
    if not chat:
        return {"index": 0, "text": piece, "finish_reason": finish}
    delta = {"role": "assistant", "content": ""} if piece is None else {"content": piece}
    return {"index": 0, "delta": delta, "finish_reason": finish}


def text(tokens: int = TOKENS) -> str:
    """Return what a server generates."""
    return "".join(f" {index}" for index in range(tokens))


@contextmanager
def scripted(
    name: str = "m", tls: ssl.SSLContext | None = None, **script: Any
) -> Iterator[ScriptedServer]:
    """Run a scripted server."""
    server = ScriptedServer(name, Script(**script), tls)
    try:
        yield server
    finally:
        server.stop()


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
