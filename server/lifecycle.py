"""The life of the server process: started, draining, stopped.

SIGTERM, SIGINT   new requests get 503, running ones finish within the drain timeout, exit 0
a second signal   stop at once
the engine dies   its requests are told, /health says 503 for a moment, exit 1
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from server.api.front import Front

logger = logging.getLogger(__name__)

_POLL = 0.05
_LAST_WORDS = 1.0
"""Seconds in which a dead engine's clients can still be told."""
_CLOSE_CONNECTIONS = 5
"""Seconds for open connections to close once nothing runs."""


class Worker(Protocol):
    """What works behind a front, on threads of its own."""

    def start(self) -> None: ...
    def stop(self) -> None:
        """End it, and what is left of its requests. Called from another thread, even twice."""


class AddressError(ValueError):
    """The address cannot be listened on."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that holds an address without listening yet.

    Raises:
        AddressError: the port is taken, or the host is none of this machine's.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise AddressError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return bound


@contextmanager
def without_collecting_what_is_there() -> Iterator[None]:
    """Keep all objects there are out of the garbage collector's sight, as long as this lasts.

    What start-up made lives as long as the process. To look through it took the collector 0.23 s
    (450,000 objects, by hand), in which every stream stood still, and a GPU as well.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # libraries complain of what is not collected at the end


class Server(uvicorn.Server):
    """uvicorn with draining, and an exit status that tells how it went."""

    def __init__(
        self,
        app: ASGIApp,
        front: Front,
        worker: Worker,
        *,
        drain_timeout: float,
        when_up: Callable[[str], None],
    ) -> None:
        """`when_up` is called with the server's URL once it listens."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_CLOSE_CONNECTIONS,
                server_header=False,
            )
        )
        self._front = front
        self._worker = worker
        self._drain_timeout = drain_timeout
        self._when_up = when_up
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.exit_status = 0

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Afterwards `exit_status` says how it went."""
        with without_collecting_what_is_there():
            self._worker.start()
            super().run(sockets)
            self._worker.stop()
        if not self.started:
            self.exit_status = 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._when_up(self._url())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._front.draining or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._front.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def engine_died(self) -> None:
        """Leave with status 1. Called from the engine's thread."""
        self.exit_status = 1
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_WORDS, self._leave)

    def _begin_drain(self) -> None:
        logger.info("draining: no new requests; %g s for the running ones", self._drain_timeout)
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._drain_timeout
        while self._front.busy and time.monotonic() < deadline:  # noqa: ASYNC110 - another thread's
            await asyncio.sleep(_POLL)
        if self._front.busy:
            logger.warning("the drain timeout has passed; aborting what is left")
            await asyncio.to_thread(self._worker.stop)
        self._leave()

    def _leave(self) -> None:
        self.should_exit = True

    def _url(self) -> str:
        address = self.servers[0].sockets[0].getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"http://{host}:{address[1]}"
