"""Sending a call to an upstream, and to another one if that fails before anything was shown.

    call --> pick --> upstream A: connection refused, 500, silence ...
             pick --> upstream B: first event ---> client        from here on there is no other

A failure after the first token ends the stream with an error event, for a second upstream would
write another text. Until then, what the first one sent (in chat, who speaks) is not sent again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from server.api.answers import json_event, raw_event
from server.api.errors import ApiError, unavailable
from server.gateway.call import Call
from server.gateway.connections import FAILURES, Answer, Connections, Outgoing
from server.gateway.sse import Event, MalformedStreamError, read_events
from server.gateway.tally import Tally
from server.gateway.upstream import Pool, Upstream

logger = logging.getLogger(__name__)

Answered = TypeVar("Answered")

_OK = 200
_BUSY = 429
_SERVER_ERROR = 500
_MAX_ERROR_BODY = 64 << 10
_END_OF_BODY = 0.1
"""Seconds from [DONE] to the end of the response, after which its connection can be reused."""


class UpstreamFailedError(Exception):
    """An upstream did not answer, or not to the end."""

    def __init__(self, upstream: Upstream, what: str, *, refusal: ApiError | None = None) -> None:
        super().__init__(f"upstream {upstream.url} {what}")
        self.refusal = refusal
        """What the upstream answered, if it did: told to the client if no other can help."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    connect: float
    silence: float
    request: float


class Opened:
    """An upstream's event stream, of which the first event has come. Close it in any case."""

    def __init__(self, upstream: Upstream, answer: Answer) -> None:
        self.upstream = upstream
        self._answer = answer
        self._events = read_events(answer.pieces())
        self._first: Event | None = None
        self._ended = False
        self._closed = False

    async def begin(self) -> None:
        """Wait for the first event.

        Raises:
            UpstreamFailedError: there is none.
        """
        self._first = await self._next()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events up to the regular end.

        Raises:
            UpstreamFailedError: it ended otherwise.
        """
        event = self._first
        while event is not None:
            yield event
            event = await self._next()

    async def close(self) -> None:
        """Let go of the connection: for reuse if the stream has ended, else for good."""
        if self._closed:
            return
        self._closed = True
        self.upstream.outstanding -= 1
        if self._ended:
            with suppress(*FAILURES, MalformedStreamError, TimeoutError):
                async with asyncio.timeout(_END_OF_BODY):
                    async for _ in self._events:
                        pass
        await self._answer.close()

    async def _next(self) -> Event | None:
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            raise self._failed("ended its stream without [DONE]") from None
        except (*FAILURES, MalformedStreamError) as error:
            raise self._failed(f"broke its stream ({_name(error)})") from error
        self._ended = event is None
        if event is not None and "error" in event.data:
            raise self._failed("sent an error", _refusal(500, event.data, {}))
        return event

    def _failed(self, what: str, refusal: ApiError | None = None) -> UpstreamFailedError:
        self.upstream.failed(connection=refusal is None)
        return UpstreamFailedError(self.upstream, what, refusal=refusal)


class Forwarder:
    """Knows how to reach upstreams; holds the connections to them."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._connections: dict[str, Connections] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shut = False

    def shut(self) -> None:
        """End what is being forwarded: clients are told so. May be called from another thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and with it all calls
                self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        self._shut = True
        for connections in self._connections.values():
            connections.abort()

    def check_open(self) -> None:
        """Raise ApiError if all calls have been ended."""
        if self._shut:
            raise unavailable("the gateway shut down before this was complete", "draining")

    async def answer(self, call: Call, pool: Pool, method: str = "POST") -> dict[str, Any]:
        """Return an upstream's whole answer.

        Raises:
            ApiError: the upstreams refused it or failed.
        """

        async def ask(upstream: Upstream) -> dict[str, Any]:
            return await self._answer_of(upstream, call, method)

        return await self._first_to_answer(pool, set(), ask)

    async def open(self, call: Call, pool: Pool, tried: set[Upstream]) -> Opened:
        """Return a stream that has begun, of an upstream that is not among `tried`.

        Raises:
            ApiError: the upstreams refused it or failed.
        """

        async def ask(upstream: Upstream) -> Opened:
            return await self._open_at(upstream, call)

        return await self._first_to_answer(pool, tried, ask)

    async def _first_to_answer(
        self, pool: Pool, tried: set[Upstream], ask: Callable[[Upstream], Awaitable[Answered]]
    ) -> Answered:
        """Ask one upstream after the other that is not among `tried`, and add those asked.

        Raises:
            ApiError: the upstreams refused it or failed.
        """
        failure: UpstreamFailedError | None = None
        while (upstream := pool.pick(tried)) is not None:
            tried.add(upstream)
            try:
                return await ask(upstream)
            except UpstreamFailedError as error:
                self.check_open()
                logger.warning("%s", error)
                failure = error
        raise _nobody(pool, failure)

    async def _answer_of(self, upstream: Upstream, call: Call, method: str) -> dict[str, Any]:
        upstream.outstanding += 1
        try:
            answer = await self._send(upstream, call, method, self._timeouts.request)
            try:
                content = json.loads(await answer.read())
            finally:
                await answer.close()
        except (*FAILURES, ValueError) as error:
            upstream.failed(connection=True)
            raise UpstreamFailedError(upstream, f"did not answer ({_name(error)})") from error
        finally:
            upstream.outstanding -= 1
        if not isinstance(content, dict):
            upstream.failed(connection=False)
            raise UpstreamFailedError(upstream, "answered something that is no JSON object")
        upstream.succeeded()
        return content

    async def _open_at(self, upstream: Upstream, call: Call) -> Opened:
        upstream.outstanding += 1
        try:
            answer = await self._send(upstream, call, "POST", self._timeouts.silence)
        except BaseException as error:
            upstream.outstanding -= 1
            if isinstance(error, FAILURES):
                upstream.failed(connection=True)
                what = f"did not answer ({_name(error)})"
                raise UpstreamFailedError(upstream, what) from error
            raise
        opened = Opened(upstream, answer)
        try:
            await opened.begin()
        except BaseException:
            await opened.close()
            raise
        return opened

    async def _send(
        self, upstream: Upstream, call: Call, method: str, silence_timeout: float
    ) -> Answer:
        """Return a successful answer whose body is not read yet.

        Raises:
            ApiError: the request is at fault.
            UpstreamFailedError: another upstream may do better.
            FAILURES: no answer.
        """
        outgoing = Outgoing(
            method,
            call.path,
            call.headers_for(upstream),
            call.body_for(upstream) if method == "POST" else b"",
            self._timeouts.connect,
            silence_timeout,
        )
        answer = await self._to(upstream).send(outgoing)
        if answer.status == _OK:
            return answer
        try:
            raw = await answer.read()
        finally:
            await answer.close()
        raise _not_successful(upstream, answer, raw)

    def _to(self, upstream: Upstream) -> Connections:
        self._loop = asyncio.get_running_loop()
        if upstream.url not in self._connections:
            self._connections[upstream.url] = Connections(upstream.url)
        return self._connections[upstream.url]


async def stream(
    call: Call, pool: Pool, opened: Opened, tried: set[Upstream], to: Forwarder, tally: Tally
) -> AsyncGenerator[bytes, None]:
    """Yield what the client is sent of a stream that has begun; closes it.

    Raises:
        ApiError: it broke, and no other upstream could take over.
    """
    relay = _Relay(call, tally)
    reason = "abort"
    try:
        while True:
            try:
                async with aclosing(relay.events(opened)) as events:
                    async for event in events:
                        yield event
                opened.upstream.succeeded()
                reason = "stop"
                return
            except UpstreamFailedError as error:
                reason = "error"
                to.check_open()
                logger.warning("%s", error)
                if relay.shown_tokens:
                    raise _broken(error) from error
                await opened.close()
                opened = await to.open(call, pool, tried)
                reason = "abort"
    finally:
        await opened.close()
        tally.ended(reason)


class _Relay:
    """Passes one answer's events on, of whichever upstreams they come."""

    def __init__(self, call: Call, tally: Tally) -> None:
        self._call = call
        self._tally = tally
        self._identity: dict[str, Any] | None = None
        self._silent = 0
        self.shown_tokens = False
        """Whether the client has seen anything that was generated."""

    async def events(self, opened: Opened) -> AsyncGenerator[bytes, None]:
        known = self._silent
        async for event in opened.events():
            if event.bears_tokens:
                self.shown_tokens = True
                self._tally.event(event.data)
            elif known:
                known -= 1
                continue
            if (usage := event.data.get("usage")) is not None:
                self._tally.usage(usage)
                if not event.data.get("choices") and not self._call.wants_usage:
                    continue
            self._silent += not self.shown_tokens
            yield self._rewritten(event)

    def _rewritten(self, event: Event) -> bytes:
        """Return the event as the client shall see it: the same bytes if nothing is to change."""
        data = event.data
        if self._identity is None:
            keys = ("id", "created")
            self._identity = {key: data[key] for key in keys if key in data}
        wanted = {**self._identity, "model": self._call.model}
        superfluous = "usage" in data and not self._call.wants_usage
        if not superfluous and all(data.get(key) == value for key, value in wanted.items()):
            return raw_event(event.raw)
        return json_event(
            {
                key: wanted.get(key, value)
                for key, value in data.items()
                if not (superfluous and key == "usage")
            }
        )


def _not_successful(upstream: Upstream, answer: Answer, raw: bytes) -> Exception:
    """Return what an answer other than success means."""
    status = answer.status
    try:
        content = json.loads(raw[:_MAX_ERROR_BODY])
    except ValueError:
        content = None
    refusal = _refusal(status, content, answer.headers)
    if status == _BUSY:
        return UpstreamFailedError(upstream, "is busy", refusal=refusal)
    if status < _SERVER_ERROR or answer.headers.get("x-should-retry") == "false":
        upstream.succeeded()
        return refusal
    upstream.failed(connection=False)
    return UpstreamFailedError(upstream, f"answered {status}", refusal=refusal)


def _refusal(status: int, content: Any, headers: Any) -> ApiError:
    """Return an upstream's error in this API's form."""
    given = content.get("error") if isinstance(content, dict) else None
    error = given if isinstance(given, dict) else {}
    message = error.get("message") or f"the upstream answered {status}"
    code = error.get("code")
    kept = ("retry-after", "x-should-retry")
    return ApiError(
        status,
        str(message)[:2000],
        kind=str(error.get("type") or "upstream_error"),
        param=error.get("param") if isinstance(error.get("param"), str) else None,
        code=code if isinstance(code, str) else None,
        headers={name: headers[name] for name in kept if name in headers},
    )


def _nobody(pool: Pool, failure: UpstreamFailedError | None) -> ApiError:
    """Return what the client is told when no upstream is left."""
    if failure is None:
        return unavailable(f"no upstream of variant {pool.variant!r} is available", "no_upstream")
    if failure.refusal is not None:
        return failure.refusal
    return ApiError(
        502,
        f"the upstreams of variant {pool.variant!r} failed; the last: {failure}",
        kind="upstream_error",
        code="upstream_failed",
    )


def _broken(error: UpstreamFailedError) -> ApiError:
    """Return how a stream ends of which a part was sent."""
    if error.refusal is not None:
        return error.refusal
    message = f"the answer was cut off: {error}"
    return ApiError(502, message, kind="upstream_error", code="upstream_failed")


def _name(error: Exception) -> str:
    return str(error) or type(error).__name__
