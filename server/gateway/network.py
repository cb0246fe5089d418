"""httpcore's network interface on asyncio's own streams.

httpcore brings one on anyio, which finds out anew for every read which event loop it runs on: a
sixth of what a token costs the gateway. This one knows.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import httpcore

_BUFFER = 64 << 10
"""Bytes that are read ahead at most: what a client does not take stays with the upstream."""


class AsyncioBackend(httpcore.AsyncNetworkBackend):
    """Opens TCP connections, and can break all of them."""

    def __init__(self) -> None:
        self._streams: WeakSet[_Stream] = WeakSet()

    def abort(self) -> None:
        """Break the connections that are open: whoever reads from one is told that it ended."""
        for stream in list(self._streams):
            stream.abort()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        with _named(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                stream = await _connect(host, port)
        self._streams.add(stream)
        return stream


async def _connect(host: str, port: int) -> _Stream:
    loop = asyncio.get_running_loop()
    reader = _Reader(limit=_BUFFER)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.create_connection(lambda: protocol, host, port)
    return _Stream(reader, asyncio.StreamWriter(transport, protocol, reader, loop))


class _Reader(asyncio.StreamReader):
    """Gives out what came before a connection broke; asyncio's own would throw it away."""

    broken: Exception | None = None

    def set_exception(self, exc: Exception) -> None:
        self.broken = exc
        self.feed_eof()


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        with _named(httpcore.ReadTimeout, httpcore.ReadError):
            async with asyncio.timeout(timeout):
                piece = await self._reader.read(max_bytes)
            if not piece and self._reader.broken is not None:
                raise self._reader.broken
            return piece

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        with _named(httpcore.WriteTimeout, httpcore.WriteError):
            self._writer.write(buffer)
            async with asyncio.timeout(timeout):
                await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        self._writer.transport.abort()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        with _named(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        return self

    def get_extra_info(self, info: str) -> Any:
        """Return `is_readable`: of an idle connection, whether the server has closed it."""
        if info == "is_readable":
            return self._reader.at_eof() or self._writer.is_closing()
        return self._writer.get_extra_info(info)


@contextmanager
def _named(timeout: type[Exception], failure: type[Exception]) -> Iterator[None]:
    """Raise what goes wrong under httpcore's names."""
    try:
        yield
    except TimeoutError as error:
        raise timeout(str(error)) from error
    except OSError as error:  # ssl.SSLError too
        raise failure(str(error)) from error
