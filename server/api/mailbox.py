"""From the engine's thread to the event loop: one wake-up for all events that wait.

    engine's thread   put put put put ........ put put put put
                       |wakes                   |wakes
    event loop          `-> deliver: all four    `-> deliver: all four, then go on with each reader

A step brings every running request a token. To wake the loop for each of them would cost both
threads more than what is then done with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from server.engine.request import Event, Sink

Receive = Callable[[Event], None]


class Mailbox:
    """Events of all requests of one event loop, in the order in which they were put."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: deque[tuple[_Sink, Event]] = deque()
        self._awaited = False
        """Whether the loop was told, and has not begun to look yet."""

    def sink(self, receive: Receive, arrival: Arrival) -> Sink:
        """Return a sink whose events `receive` is called with, on the event loop that runs now.
        Once all that wait have been received, `arrival` wakes who awaits it."""
        self._loop = asyncio.get_running_loop()
        return _Sink(self, receive, arrival)

    def put(self, sink: _Sink, event: Event) -> None:
        """Add an event. Called on the engine's thread."""
        self._events.append((sink, event))
        if not self._awaited:
            assert self._loop is not None
            self._awaited = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the first look: an event that comes after the last one wakes the loop again.
        self._awaited = False
        arrivals: dict[Arrival, None] = {}  # as a set that keeps their order
        try:
            while self._events:
                sink, event = self._events.popleft()
                arrivals[sink.arrival] = None
                sink.receive(event)
        finally:  # one that fails keeps nothing from the others
            if self._events:
                asyncio.get_running_loop().call_soon(self._deliver)
            for arrival in arrivals:
                arrival.wake()


class Arrival:
    """What a task awaits until something has come for it, as often as it likes.

    To a task it is a future: these are the methods that asyncio asks of one. But a future's task
    goes on a turn of the event loop later, through a callback and a handle of its own, and `wake`
    goes on with it at once. Who awaits it looks first whether something is there: to wake nobody
    does nothing.
    """

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_context", "_loop", "_resume")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._resume: Callable[[Arrival], object] | None = None
        """Goes on with the task that waits, if one does."""
        self._context: Context | None = None
        self._cancelled = False
        self._asyncio_future_blocking = False

    def wake(self) -> None:
        """Go on with the task that waits, until it waits again. Called outside of any task."""
        resume, self._resume = self._resume, None
        if resume is not None:
            assert self._context is not None
            self._context.run(resume, self)

    def __await__(self) -> Generator[Any, None, None]:
        self._asyncio_future_blocking = True  # how a task knows a future
        yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, resume: Callable[[Arrival], object], *, context: Context) -> None:
        self._resume, self._context = resume, context

    def result(self) -> None:
        """Asked by the task that goes on."""
        if self._cancelled:
            self._cancelled = False
            raise asyncio.CancelledError

    def cancel(self, msg: object = None) -> bool:
        """Cancel the task that waits: it goes on, with the error, in the loop's next turn."""
        del msg
        if self._resume is None:
            return False
        resume, self._resume = self._resume, None
        self._cancelled = True
        self._loop.call_soon(resume, self, context=self._context)
        return True


@dataclass(frozen=True, slots=True)
class _Sink:
    """Where the engine puts one request's events."""

    mailbox: Mailbox
    receive: Receive
    arrival: Arrival

    def put(self, event: Event) -> None:
        self.mailbox.put(self, event)
