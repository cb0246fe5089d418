"""How answers leave: whole, or as server-sent events, and what happens when the client leaves.

An event stream holds one JSON object an event and ends with `[DONE]`. A failure after the stream
has begun is sent as an event with an `error`, which the openai client raises.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import ApiError

Json = Mapping[str, Any]
T = TypeVar("T")
Write = Callable[[bytes], Awaitable[None]]
"""Sends a piece of a body; waits as long as the client has too much to read already."""
WriteEvents = Callable[[Write], Awaitable[None]]
"""Writes all events of a stream, but for the last. An ApiError becomes one."""

SEND_BODY = "send_body"
"""Where a request's state holds the `send` of the server itself: middleware looks at how an answer
starts, and would only hand on each piece that follows."""


class ClientLeftError(Exception):
    """The client closed the connection before its answer was complete."""


async def unless_client_leaves(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Return what `answer` returns, cancelling it if the client disconnects first.

    Raises:
        ClientLeftError: nobody is there to read the answer.
    """
    task = asyncio.create_task(answer)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        await _cancel(task, gone)


class EventStream(Response):
    """Server-sent events, as they are written: each piece is one or several of them."""

    media_type = "text/event-stream"

    def __init__(self, events: WriteEvents, headers: Mapping[str, str]) -> None:
        super().__init__(
            headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._write_events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        body = asyncio.create_task(self._send_body(scope.get("state", {}).get(SEND_BODY, send)))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({body, gone}, return_when=asyncio.FIRST_COMPLETED)
            if body.done():
                body.result()
        finally:
            await _cancel(body, gone)

    async def _send_body(self, send: Send) -> None:
        def write(piece: bytes) -> Awaitable[None]:
            return send({"type": "http.response.body", "body": piece, "more_body": True})

        try:
            await self._write_events(write)
        except ApiError as error:
            await write(json_event(error.body))
        else:
            await write(raw_event(b"[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_event(value: Json) -> bytes:
    """Return the server-sent event of a JSON object."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return raw_event(text.encode())


def raw_event(data: bytes) -> bytes:
    """Return the server-sent event of data that has no line breaks."""
    return b"data: " + data + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have cleaned up; those that are done keep their result."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
