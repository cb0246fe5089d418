"""Kept-open HTTP connections to one upstream.

The connections are httpcore's, which is what httpx is made of. Its connection pool is not used: for
every request it looks at all connections for each of them, and 32 streams that begin together wait
0.1 s for it. Here the latest idle connection is taken, or a new one opened.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpcore

from server.gateway.network import AsyncioBackend

FAILURES = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError)
"""What goes wrong between here and an upstream."""

_KEEP_SECONDS = 30.0
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as it is sent."""

    method: str
    path: str
    headers: Mapping[str, str]
    content: bytes
    connect_timeout: float
    silence_timeout: float
    """Seconds in which some bytes must come."""


class Answer:
    """A response whose body is read by and by. Close it in any case."""

    def __init__(
        self,
        response: httpcore.Response,
        connection: httpcore.AsyncHTTPConnection,
        idle: list[httpcore.AsyncHTTPConnection],
    ) -> None:
        self.status = response.status
        self.headers = {
            k.decode("latin-1").lower(): v.decode("latin-1") for k, v in response.headers
        }
        self._response = response
        self._connection = connection
        self._idle = idle

    def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        return self._response.aiter_stream()

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def close(self) -> None:
        """Keep the connection if the body was read to its end, else close it."""
        await self._response.aclose()
        if self._connection.is_idle():
            self._idle.append(self._connection)
        else:
            await self._connection.aclose()


class Connections:
    """The connections to one upstream."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        host, scheme = (parts.hostname or "").encode(), parts.scheme.encode()
        self._origin = httpcore.Origin(scheme, host, parts.port or _PORTS[parts.scheme])
        self._authority = parts.netloc.rpartition("@")[2]
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._idle: list[httpcore.AsyncHTTPConnection] = []
        self._network = AsyncioBackend()

    def abort(self) -> None:
        """Break all connections."""
        self._network.abort()

    async def send(self, outgoing: Outgoing) -> Answer:
        """Return the response once its headers have come.

        A kept connection may have been closed by the server meanwhile; then a new one is tried.

        Raises:
            FAILURES: no response.
        """
        while (connection := self._take()) is not None:
            try:
                return await self._send_on(connection, outgoing)
            except (httpcore.NetworkError, httpcore.RemoteProtocolError):
                continue
        fresh = httpcore.AsyncHTTPConnection(
            self._origin,
            ssl_context=self._tls,
            keepalive_expiry=_KEEP_SECONDS,
            network_backend=self._network,
        )
        return await self._send_on(fresh, outgoing)

    def _take(self) -> httpcore.AsyncHTTPConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_available() and not connection.has_expired():
                return connection
        return None

    async def _send_on(
        self, connection: httpcore.AsyncHTTPConnection, outgoing: Outgoing
    ) -> Answer:
        request = httpcore.Request(
            outgoing.method,
            httpcore.URL(
                scheme=self._origin.scheme,
                host=self._origin.host,
                port=self._origin.port,
                target=(self._prefix + outgoing.path).encode(),
            ),
            headers=self._headers(outgoing),
            content=outgoing.content,
            extensions={
                "timeout": {
                    "connect": outgoing.connect_timeout,
                    "read": outgoing.silence_timeout,
                    "write": outgoing.silence_timeout,
                }
            },
        )
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            await connection.aclose()
            raise
        return Answer(response, connection, self._idle)

    def _headers(self, outgoing: Outgoing) -> list[tuple[str, str]]:
        length = [("Content-Length", str(len(outgoing.content)))] if outgoing.content else []
        return [("Host", self._authority), *outgoing.headers.items(), *length]
