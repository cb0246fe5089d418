"""What arrived before a connection broke is read before the break is told."""

from __future__ import annotations

import asyncio
import socket
import struct

import httpcore
import pytest

from server.gateway.network import AsyncioBackend


def test_nothing_that_arrived_is_lost_to_a_reset():
    async def send_and_reset(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * 1000)
        await writer.drain()
        await asyncio.sleep(0.05)
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def run() -> None:
        server = await asyncio.start_server(send_and_reset, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        stream = await AsyncioBackend().connect_tcp("127.0.0.1", port, timeout=1)
        await asyncio.sleep(0.2)  # both the bytes and the reset are here before anyone reads
        assert await stream.read(600, timeout=1) == b"x" * 600
        assert await stream.read(600, timeout=1) == b"x" * 400
        with pytest.raises(httpcore.ReadError):
            await stream.read(600, timeout=1)
        assert stream.get_extra_info("is_readable")
        await stream.aclose()
        server.close()

    asyncio.run(run())


def test_silence_and_nobody():
    async def run() -> None:
        server = await asyncio.start_server(lambda *_: asyncio.sleep(1), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        stream = await AsyncioBackend().connect_tcp("127.0.0.1", port, timeout=1)
        with pytest.raises(httpcore.ReadTimeout):
            await stream.read(1, timeout=0.05)
        await stream.aclose()
        server.close()
        with pytest.raises(httpcore.ConnectError):
            await AsyncioBackend().connect_tcp("127.0.0.1", 1, timeout=1)

    asyncio.run(run())
