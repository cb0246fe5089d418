"""From the engine's thread to the event loop: one wake-up for all events that wait.

    engine's thread   put put put put ........ put put put put
                       |wakes                   |wakes
    event loop          `-> deliver: all four    `-> deliver: all four

A step brings every running request a token. To wake the loop for each of them would cost both
threads more than what is then done with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.request import Event, Sink

Receive = Callable[[Event], None]


class Mailbox:
    """Events of all requests of one event loop, in the order in which they were put."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: deque[tuple[Receive, Event]] = deque()
        self._awaited = False
        """Whether the loop was told, and has not begun to look yet."""

    def sink(self, receive: Receive) -> Sink:
        """Return a sink whose events `receive` is called with, on the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        return _Sink(self, receive)

    def put(self, receive: Receive, event: Event) -> None:
        """Add an event. Called on the engine's thread."""
        self._events.append((receive, event))
        if not self._awaited:
            assert self._loop is not None
            self._awaited = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the first look: an event that comes after the last one wakes the loop again.
        self._awaited = False
        try:
            while self._events:
                receive, event = self._events.popleft()
                receive(event)
        finally:  # one that fails keeps nothing from the others
            if self._events:
                asyncio.get_running_loop().call_soon(self._deliver)


@dataclass(frozen=True, slots=True)
class _Sink:
    """Where the engine puts one request's events."""

    mailbox: Mailbox
    receive: Receive

    def put(self, event: Event) -> None:
        self.mailbox.put(self.receive, event)
