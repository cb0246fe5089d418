"""Event streams over real sockets: slow readers, and clients that leave them."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import uvicorn
from fastapi import APIRouter

from server.api.answers import EventStream, Write
from server.api.front import Front
from server.app import create_app
from server.lifecycle import bind
from server.metrics import RequestMetrics
from tests.api.calls import wait_until

PIECE = b"data: " + b"x" * 65_000 + b"\n\n"
GET = b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n"


class Streamer:
    """Streams pieces without end, and notes how many were taken and whether the stream ended."""

    def __init__(self) -> None:
        self.taken = 0
        self.ended = False
        self.router = APIRouter()
        self.router.add_api_route("/stream", self._stream)

    async def _stream(self) -> EventStream:
        return EventStream(self._write, {})

    async def _write(self, write: Write) -> None:
        try:
            while True:
                self.taken += 1
                await write(PIECE)
                await asyncio.sleep(0)
        finally:
            self.ended = True

    def stands_still(self) -> bool:
        """Whether no piece is taken for a while."""
        before = self.taken
        time.sleep(0.3)
        return self.taken == before


@pytest.fixture
def streamer() -> Streamer:
    return Streamer()


@pytest.fixture
def port(streamer: Streamer) -> Iterator[int]:
    """A server of the whole application's middleware, on a thread of its own."""
    front = SimpleNamespace(version="1", metrics=RequestMetrics("m", ["full"], []))
    app = create_app(cast(Front, front), [streamer.router], cors_origins=["https://app.example"])
    address = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([address],))
    thread.start()
    wait_until(lambda: server.started, 10)
    yield address.getsockname()[1]
    server.should_exit = True
    thread.join()


def test_a_slow_reader_holds_its_stream_back(streamer: Streamer, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(GET)
        wait_until(streamer.stands_still, 20)
        held = streamer.taken
        assert 0 < held * len(PIECE) < 64 << 20  # what the kernel buffers, and no more
        read = 0
        while streamer.taken == held:
            read += len(client.recv(1 << 20))
        assert read > 0
        assert not streamer.ended
    wait_until(lambda: streamer.ended, 10)


def test_a_client_that_leaves_a_stream_that_is_held_back_ends_it(
    streamer: Streamer, port: int
) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(GET)
        wait_until(streamer.stands_still, 20)
        assert not streamer.ended
    wait_until(lambda: streamer.ended, 10)
