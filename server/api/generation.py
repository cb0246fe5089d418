"""The choices of one HTTP request while they are generated: engine events to pieces of text.

    engine thread --mailbox--> event loop: metrics, inbox --> Generation.more() --> JSON or SSE

A generation is read `with` it. Whoever stops reading, for whatever reason, thereby aborts the
choices that have not ended: a client that disconnects frees its pages before the next step.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from server.api.errors import ApiError, bad_request, generation_failed, queue_full, unavailable
from server.api.mailbox import Arrival
from server.api.service import Service
from server.engine.detokenize import StopStrings, TextStream, Vocabulary
from server.engine.engine import EngineDeadError, QueueFullError, TooLongError
from server.engine.request import (
    Ended,
    Event,
    FinishReason,
    PromptScored,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from server.metrics import RequestMetrics


@dataclass(frozen=True, slots=True)
class ChoiceSpec:
    """One choice to generate."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stops: tuple[str, ...]
    echo: str | None
    """The prompt's text, where it is to be part of the answer."""


class Shown(NamedTuple):
    """A token as the answer shows it. (Like `Delta` a tuple: one is made for every token, and a
    frozen dataclass takes four times as long to make.)"""

    token: int
    logprobs: TokenLogprobs | None
    """None where none were asked for, and for the first token of an echoed prompt."""
    offset: int
    """Characters of the answer's text before it, those held back for a stop string included."""


class Delta(NamedTuple):
    """What one event adds to a choice."""

    choice: int
    text: str
    shown: tuple[Shown, ...]
    generated: int
    """Tokens that count as generated."""
    finish: FinishReason | None = None


@dataclass(slots=True)
class _Choice:
    """The text of one choice so far."""

    index: int
    spec: ChoiceSpec
    stream: TextStream
    stops: StopStrings
    characters: int = 0
    scores: list[TokenLogprobs] = field(default_factory=list)
    echoed: bool = False
    finish: FinishReason | None = None
    """Set by the last delta; tokens that the engine computed beyond it are not shown."""
    ended: bool = False
    """Whether the engine has let go of it, and that has been seen here."""
    cached_tokens: int = 0
    """Set at the end: prompt tokens that were not computed for it."""

    def take(self, event: Event, vocabulary: Vocabulary, deltas: list[Delta]) -> None:
        """Append what an event adds."""
        if isinstance(event, PromptScored):
            self.scores.extend(event.logprobs)
            return
        if self.spec.echo is not None and not self.echoed:
            deltas.append(self._echo(vocabulary))
        if isinstance(event, TokenEvent):
            if self.finish is None:
                deltas.append(self._token(event))
        else:
            self.cached_tokens = event.cached_tokens
            if self.finish is None:
                self.finish = event.reason
                deltas.append(Delta(self.index, "", (), 0, event.reason))

    def _echo(self, vocabulary: Vocabulary) -> Delta:
        self.echoed = True
        assert self.spec.echo is not None
        self.characters = len(self.spec.echo)
        if self.spec.params.prompt_logprobs is None:
            return Delta(self.index, self.spec.echo, (), 0)
        offsets = _offsets(vocabulary, self.spec.prompt, self.spec.echo)
        entries = zip(self.spec.prompt, [None, *self.scores], offsets, strict=True)
        return Delta(self.index, self.spec.echo, tuple(Shown(*entry) for entry in entries), 0)

    def _token(self, event: TokenEvent) -> Delta:
        token, logprobs, _, finish = event
        ends = finish is FinishReason.STOP  # like a stop string, a stop token is not shown
        new = "" if ends else self.stream.push(token)
        text, stopped = self.stops.push(new)
        if stopped:
            finish = FinishReason.STOP
        elif finish is not None:
            text += self._rest()
        self.finish = finish
        shown = Shown(token, logprobs, self.characters)
        self.characters += len(new)
        return Delta(self.index, text, (shown,), 1, finish)

    def _rest(self) -> str:
        """Return the text that was held back until it was known that no more follows."""
        matched = self.stops.push(self.stream.flush())
        return matched.text + self.stops.flush()


def _offsets(vocabulary: Vocabulary, tokens: Sequence[int], text: str) -> Iterator[int]:
    """Yield how many characters of their text come before each token.

    Special tokens count where the text spells them out: what was given as a text may do so, the
    text of what was given as tokens does not.
    """
    stream, offset = TextStream(vocabulary), 0
    for token in tokens:
        yield min(offset, len(text))
        if vocabulary.is_special(token):
            spelled = vocabulary.token_text(token)
            offset += len(spelled) if text.startswith(spelled, offset) else 0
        else:
            offset += len(stream.push(token))


class _Inbox:
    """Events of all choices, in order, and the metrics they make.

    Metrics are taken here and not where events are read, so that they are complete for clients
    that left.
    """

    def __init__(self, metrics: RequestMetrics, variant: str, prompt_tokens: Sequence[int]) -> None:
        self._events: list[tuple[int, Event]] = []
        self._metrics = metrics
        self._variant = variant
        self._prompt_tokens = prompt_tokens
        self._generated = [0] * len(prompt_tokens)
        self._latest: list[float | None] = [None] * len(prompt_tokens)

    def take(self) -> list[tuple[int, Event]]:
        """Return the events that came since the last time."""
        events, self._events = self._events, []
        return events

    def receive(self, index: int, event: Event) -> None:
        self._events.append((index, event))
        if isinstance(event, TokenEvent):
            self._generated[index] += 1
            latest = self._latest[index]
            if latest is not None:
                self._metrics.token_emitted(self._variant, event.time - latest)
            self._latest[index] = event.time
        elif isinstance(event, Ended):
            self._metrics.finished(
                self._variant,
                event.reason.value,
                self._prompt_tokens[index],
                self._generated[index],
                event.timeline,
            )


class Generation:
    """The choices of one HTTP request, submitted together."""

    def __init__(
        self, service: Service, variant: str, request_id: str, specs: Sequence[ChoiceSpec]
    ) -> None:
        """Submit the choices.

        Raises:
            ApiError: 400 too long, 429 queue full, 503 draining or dead.
        """
        self._service = service
        self._inbox = _Inbox(service.metrics, variant, [len(spec.prompt) for spec in specs])
        self._arrival = Arrival()
        self._choices = [
            _Choice(i, spec, TextStream(service.vocabulary), StopStrings(spec.stops))
            for i, spec in enumerate(specs)
        ]
        self._open = len(specs)
        """Choices that have not ended."""
        self._failure: ApiError | None = None
        arrived = time.monotonic()
        self._requests = [
            Request(
                id=f"{request_id}-{i}",
                prompt=spec.prompt,
                variant=variant,
                params=spec.params,
                sink=service.mailbox.sink(partial(self._inbox.receive, i), self._arrival),
                arrived=arrived,
            )
            for i, spec in enumerate(specs)
        ]
        self._submit()

    def cached_tokens(self, drafts: int) -> int:
        """Return the prompt tokens that no choice had to compute, each prompt counted once.

        Every `drafts` choices share a prompt. Known when all of them have ended.
        """
        cached = [choice.cached_tokens for choice in self._choices]
        return sum(min(cached[at : at + drafts]) for at in range(0, len(cached), drafts))

    def __enter__(self) -> None:
        """Begin to read."""

    def __exit__(self, *_: object) -> None:
        """Stop reading, and abort what has not ended."""
        for choice, request in zip(self._choices, self._requests, strict=True):
            if not choice.ended:
                self._service.engine.abort(request.id)

    async def more(self) -> Sequence[Delta]:
        """Return the pieces of all choices that came since the last time, and wait if none did;
        nothing once every choice has ended.

        Raises:
            ApiError: 500 or 503, a choice ended too early, and all that came before was returned.
        """
        while self._open or self._failure is not None:
            if found := self._take():
                return found
            if self._open:
                await self._arrival
        return ()

    def _take(self) -> Sequence[Delta]:
        """Return what is there of it."""
        if self._failure is not None:
            raise self._failure
        found: list[Delta] = []
        for index, event in self._inbox.take():
            choice = self._choices[index]
            if isinstance(event, Ended):
                choice.ended = True
                self._open -= 1
                if failure := _failure(event):
                    self._failure = failure
                    break
            was_over = choice.finish is not None
            choice.take(event, self._service.vocabulary, found)
            if choice.finish is FinishReason.STOP and not was_over and not choice.ended:
                self._service.engine.abort(self._requests[index].id, FinishReason.STOP)
        if self._failure is not None and not found:
            raise self._failure
        return found

    async def deltas(self) -> AsyncGenerator[Sequence[Delta], None]:
        """Yield what `more` returns, as it comes, until every choice has ended."""
        with self:
            while found := await self.more():
                yield found

    def _submit(self) -> None:
        service = self._service
        if service.draining:
            service.metrics.refused("draining")
            raise unavailable("the server is shutting down; try another one", "draining")
        try:
            service.engine.submit(self._requests)
        except TooLongError as error:
            raise bad_request(str(error), code="context_length_exceeded") from error
        except QueueFullError as error:
            service.metrics.refused("queue_full")
            raise queue_full(str(error)) from error
        except EngineDeadError as error:
            raise unavailable(str(error), "engine_dead") from error


def _failure(end: Ended) -> ApiError | None:
    """Return what a choice that ended too early is answered with."""
    if end.reason is FinishReason.ERROR:
        return generation_failed(end.error or "unknown reason")
    if end.reason is FinishReason.ABORT:
        return unavailable("the server shut down before this was complete", "draining")
    return None
