"""A server that streams tokens at an even pace, to measure what stands in front of it.

    python -m benchmarks.paced --port 9000 --first-ms 50 --pace-ms 20

Answers /v1/models, /health and /metrics as an OpenAI-compatible server does, and every POST with a
stream of as many tokens as it asks for. Raw sockets: its own cost must not be what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import Annotated

import typer

MODEL = "paced"
_LENGTH = re.compile(r"content-length: *(\d+)", re.IGNORECASE)


class PacedServer:
    """Tokens at fixed times after a request has come."""

    def __init__(self, first: float, pace: float) -> None:
        self._first = first
        self._pace = pace

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = _LENGTH.search(head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if head.startswith("POST"):
                    await self._stream(int(json.loads(body)["max_tokens"]), writer)
                else:
                    self._answer(head.split(" ")[1], writer)
        writer.close()

    def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        models = {"data": [{"id": MODEL, "max_model_len": 4096}]}
        text = json.dumps(models) if path == "/v1/models" else ""
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())

    async def _stream(self, tokens: int, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time() + self._first
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for index in range(tokens):
            await asyncio.sleep(start + index * self._pace - loop.time())
            finish = "length" if index == tokens - 1 else None
            choice = {"index": 0, "text": " token", "finish_reason": finish}
            event = {"id": "cmpl", "created": 1, "model": MODEL, "choices": [choice]}
            _chunk(writer, json.dumps(event))
        _chunk(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _chunk(writer: asyncio.StreamWriter, data: str) -> None:
    event = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(event), event))


async def _run(port: int, server: PacedServer) -> None:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", port)
    bound = listening.sockets[0].getsockname()[1]
    typer.echo(f"paced server serves it at http://127.0.0.1:{bound}")
    await listening.serve_forever()


def main(
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
    first_ms: Annotated[float, typer.Option(help="To the first token.")] = 50,
    pace_ms: Annotated[float, typer.Option(help="Between two tokens.")] = 20,
) -> None:
    """Serve until stopped."""
    asyncio.run(_run(port, PacedServer(first_ms / 1000, pace_ms / 1000)))


if __name__ == "__main__":
    typer.run(main)
