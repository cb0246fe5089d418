"""The engine's events on their way to the event loop, and what a stream makes of them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pruning.loading import BaseModel
from server.api.answers import EventStream, Write
from server.api.chunks import Chunks, write_chunks
from server.api.errors import ApiError
from server.api.generation import ChoiceSpec, Delta, Generation
from server.api.mailbox import Arrival, Mailbox
from server.api.service import Service
from server.api.usage import Usage
from server.engine.detokenize import Vocabulary
from server.engine.request import (
    Ended,
    Event,
    FinishReason,
    Request,
    SamplingParams,
    Sink,
    TokenEvent,
)
from server.engine.stats import Timeline
from server.metrics import RequestMetrics
from tests.api.calls import events

TIMELINE = Timeline(0.0, 1.0, 2.0, 3.0)


def token(number: int, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(number, None, 0.0, finish)


def on_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def put_in(sinks: Sequence[Sink], event: Event) -> None:
    for sink in sinks:
        sink.put(event)


def put_all(sink: Sink, what: Sequence[Event]) -> None:
    for event in what:
        sink.put(event)


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread woke it."""

    wakes = 0

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> asyncio.Handle:
        self.wakes += 1
        return super().call_soon_threadsafe(*arguments, **options)


def wakes_of(work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run a coroutine; return how often other threads woke its loop."""
    loop = CountingLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(work())
        return loop.wakes


class TestMailbox:
    def test_events_that_wait_together_wake_the_loop_once(self) -> None:
        seen: list[tuple[str, Event]] = []

        async def work() -> None:
            mailbox = Mailbox()
            a = mailbox.sink(lambda event: seen.append(("a", event)), Arrival())
            b = mailbox.sink(lambda event: seen.append(("b", event)), Arrival())
            for step in range(2):
                on_a_thread(partial(put_in, [a, b, a], token(step)))
                assert len(seen) == 3 * step
                await asyncio.sleep(0.01)

        assert wakes_of(work) == 2
        assert [name for name, _ in seen] == ["a", "b", "a"] * 2
        assert [event for _, event in seen] == [token(0)] * 3 + [token(1)] * 3

    def test_none_is_lost_or_overtaken_while_the_loop_works(self) -> None:
        count, seen = 20_000, list[int]()

        async def work() -> None:
            mailbox = Mailbox()
            receive = lambda event: seen.append(cast(TokenEvent, event).token)  # noqa: E731
            sink = mailbox.sink(receive, Arrival())

            def put() -> None:
                for number in range(count):
                    sink.put(token(number))

            await asyncio.to_thread(put)
            await asyncio.sleep(0.01)

        asyncio.run(work())
        assert seen == list(range(count))

    def test_a_failing_receiver_keeps_nothing_from_the_others(self) -> None:
        seen: list[Event] = []
        failures: list[dict[str, Any]] = []

        def fail(event: Event) -> None:
            raise ValueError("a bug")

        async def work() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what))
            mailbox = Mailbox()
            failing, good = mailbox.sink(fail, Arrival()), mailbox.sink(seen.append, Arrival())
            on_a_thread(partial(put_in, [failing, good, failing, good], token(1)))
            await asyncio.sleep(0.01)

        asyncio.run(work())
        assert len(seen) == len(failures) == 2


class Reader:
    """Notes all that has come, each time that it is woken."""

    def __init__(self, name: str, mailbox: Mailbox, log: list[tuple[str, list[Event]]]) -> None:
        self._name = name
        self._log = log
        self._waiting: list[Event] = []
        self._arrival = Arrival()
        self.sink = mailbox.sink(self._waiting.append, self._arrival)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            await self._arrival
            self._log.append((self._name, list(self._waiting)))
            self._waiting.clear()


class TestArrival:
    def test_each_reader_goes_on_once_in_order_after_all_was_received(self) -> None:
        log: list[tuple[str, list[Event]]] = []

        async def work() -> None:
            mailbox = Mailbox()
            a, b, c = (Reader(name, mailbox, log) for name in "abc")
            await asyncio.sleep(0)
            for step in range(3):
                on_a_thread(partial(put_in, [b.sink, a.sink, b.sink], token(step)))
                await asyncio.sleep(0.01)
            for reader in (a, b, c):
                reader.task.cancel()

        asyncio.run(work())
        assert log == [
            pair for step in map(token, range(3)) for pair in (("b", [step] * 2), ("a", [step]))
        ]

    def test_a_reader_goes_on_within_the_delivery(self) -> None:
        log: list[tuple[str, list[Event]]] = []

        async def work() -> int:
            mailbox = Mailbox()
            reader = Reader("a", mailbox, log)
            await asyncio.sleep(0)
            on_a_thread(partial(put_in, [reader.sink], token(1)))
            turns = 0
            while not log:
                turns += 1
                await asyncio.sleep(0)
            reader.task.cancel()
            return turns

        assert asyncio.run(work()) == 1

    def test_waking_a_reader_that_waits_for_something_else_does_nothing(self) -> None:
        async def work() -> list[str]:
            log: list[str] = []
            arrival, other = Arrival(), asyncio.Event()

            async def read() -> None:
                await arrival
                log.append("first")
                await other.wait()
                log.append("other")
                await arrival
                log.append("second")

            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(arrival.wake)
            asyncio.get_running_loop().call_soon(arrival.wake)
            await asyncio.sleep(0.01)
            assert log == ["first"]
            other.set()
            await asyncio.sleep(0.01)
            assert log == ["first", "other"]
            asyncio.get_running_loop().call_soon(arrival.wake)
            await reading
            return log

        assert asyncio.run(work()) == ["first", "other", "second"]

    def test_cancelling_a_reader_lets_it_clean_up_and_later_wakes_do_nothing(self) -> None:
        async def work() -> list[str]:
            log: list[str] = []
            arrival = Arrival()

            async def read() -> None:
                try:
                    await arrival
                finally:
                    await asyncio.sleep(0)
                    log.append("cleaned up")

            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            reading.cancel()
            asyncio.get_running_loop().call_soon(arrival.wake)
            with pytest.raises(asyncio.CancelledError):
                await reading
            return log

        assert asyncio.run(work()) == ["cleaned up"]

    def test_a_reader_that_was_cancelled_may_wait_again(self) -> None:
        async def work() -> str:
            arrival = Arrival()

            async def read() -> str:
                try:
                    await arrival
                except asyncio.CancelledError:
                    await arrival
                return "woken"

            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_soon(arrival.wake)
            return await reading

        assert asyncio.run(work()) == "woken"

    def test_a_reader_keeps_its_context_variables(self) -> None:
        name = ContextVar("name", default="nobody")

        async def work() -> list[str]:
            seen: list[str] = []
            arrival = Arrival()

            async def read() -> None:
                name.set("reader")
                await arrival
                seen.append(name.get())

            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(arrival.wake)
            await reading
            return [*seen, name.get()]

        assert asyncio.run(work()) == ["reader", "nobody"]


class ScriptedEngine:
    """Puts a list of events for each request, all of them as soon as it is submitted."""

    def __init__(self, script: Sequence[Event]) -> None:
        self.script = script
        self.aborted: list[tuple[str, FinishReason]] = []

    def submit(self, requests: Sequence[Request]) -> None:
        def put() -> None:
            for event in self.script:
                for request in requests:
                    request.sink.put(event)

        on_a_thread(put)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.append((request_id, reason))


class SubmittedEngine(ScriptedEngine):
    """Has nothing of a script put by itself: tests put events in its requests."""

    def __init__(self) -> None:
        super().__init__([])
        self.sinks: list[Sink] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self.sinks = [request.sink for request in requests]


def generation_of(
    engine: ScriptedEngine, base: BaseModel, choices: int = 1, stops: tuple[str, ...] = ()
) -> Generation:
    service = SimpleNamespace(
        engine=engine,
        mailbox=Mailbox(),
        metrics=RequestMetrics("m", ["full"], []),
        vocabulary=Vocabulary(base.tokenizer),
        draining=False,
    )
    spec = ChoiceSpec((1,), SamplingParams(max_tokens=9), stops, None)
    return Generation(cast(Service, service), "full", "r", [spec] * choices)


class TestGeneration:
    @pytest.fixture
    def generate(self, base: BaseModel) -> Callable[..., Any]:
        """Return what collects the batches of deltas of a script, and the error at the end."""

        async def collect(
            engine: ScriptedEngine, choices: int = 1, stops: tuple[str, ...] = ()
        ) -> tuple[list[Sequence[Delta]], ApiError | None]:
            generation = generation_of(engine, base, choices, stops)
            batches: list[Sequence[Delta]] = []
            try:
                async for deltas in generation.deltas():
                    batches.append(deltas)
            except ApiError as error:
                return batches, error
            return batches, None

        return lambda *given, **named: asyncio.run(collect(*given, **named))

    def test_what_waits_comes_at_once_and_in_order(
        self, base: BaseModel, generate: Callable[..., Any]
    ) -> None:
        numbers = base.tokenizer(" one two three")["input_ids"]
        last = token(numbers[-1], FinishReason.LENGTH)
        script = [*map(token, numbers[:-1]), last, Ended(FinishReason.LENGTH, TIMELINE)]
        engine = ScriptedEngine(script)
        batches, error = generate(engine, choices=2)
        assert error is None
        assert len(batches) == 1
        assert not engine.aborted
        for index in range(2):
            deltas = [delta for delta in batches[0] if delta.choice == index]
            assert [shown.token for delta in deltas for shown in delta.shown] == numbers
            assert "".join(delta.text for delta in deltas) == " one two three"
            assert [delta.finish for delta in deltas] == [
                *[None] * (len(numbers) - 1),
                FinishReason.LENGTH,
            ]

    @pytest.mark.parametrize(
        ("end", "status"), [(FinishReason.ERROR, 500), (FinishReason.ABORT, 503)]
    )
    def test_tokens_come_before_the_failure_that_came_with_them(
        self, generate: Callable[..., Any], end: FinishReason, status: int
    ) -> None:
        engine = ScriptedEngine([token(300), Ended(end, TIMELINE)])
        batches, error = generate(engine, choices=2)
        assert [delta.shown[0].token for deltas in batches for delta in deltas] == [300, 300]
        assert error is not None
        assert error.status == status
        assert engine.aborted == [("r-1", FinishReason.ABORT)]  # the one that was still open

    def test_a_stop_string_ends_a_choice_within_what_waits(
        self, base: BaseModel, generate: Callable[..., Any]
    ) -> None:
        numbers = base.tokenizer(" one two three four")["input_ids"]
        script = [*map(token, numbers), Ended(FinishReason.STOP, TIMELINE)]
        engine = ScriptedEngine(script)
        (deltas,), error = generate(engine, stops=("three",))
        assert error is None
        assert "".join(delta.text for delta in deltas) == " one two "
        assert [delta.finish for delta in deltas if delta.finish] == [FinishReason.STOP]
        assert engine.aborted == [("r-0", FinishReason.STOP)]

    def test_what_comes_while_its_reader_is_held_up_comes_at_once_later(
        self, base: BaseModel
    ) -> None:
        async def work() -> list[list[int]]:
            engine, writable = SubmittedEngine(), asyncio.Event()
            generation = generation_of(engine, base)
            batches: list[list[int]] = []

            async def read() -> None:
                async for deltas in generation.deltas():
                    batches.append([shown.token for delta in deltas for shown in delta.shown])
                    await writable.wait()

            reading = asyncio.create_task(read())
            for number in range(300, 304):
                await asyncio.sleep(0.01)
                on_a_thread(partial(put_in, engine.sinks, token(number)))
            await asyncio.sleep(0.01)
            assert batches == [[300]]
            writable.set()
            await asyncio.sleep(0.01)
            on_a_thread(partial(put_in, engine.sinks, Ended(FinishReason.LENGTH, TIMELINE)))
            await reading
            return batches

        assert asyncio.run(work()) == [[300], [301, 302, 303], []]

    @pytest.mark.parametrize("stops", [(), ("three",)])
    def test_deltas_and_writes_are_the_same_pieces(
        self, base: BaseModel, stops: tuple[str, ...]
    ) -> None:
        one, two, three = map(token, base.tokenizer(" one two three")["input_ids"])
        end = Ended(FinishReason.STOP if stops else FinishReason.LENGTH, TIMELINE)
        last = three if stops else three._replace(finish=FinishReason.LENGTH)
        steps: list[list[Event]] = [[one], [two, last], [end]]

        async def work(read: Callable[[Generation, list[Any]], Coroutine[Any, Any, None]]) -> Any:
            engine, found = SubmittedEngine(), list[Any]()
            reading = asyncio.create_task(read(generation_of(engine, base, stops=stops), found))
            for step in steps:
                await asyncio.sleep(0.01)
                on_a_thread(partial(put_all, engine.sinks[0], step))
            await asyncio.wait_for(reading, 10)
            assert engine.aborted == [("r-0", FinishReason.STOP)] * len(stops)
            return found

        async def from_deltas(generation: Generation, found: list[Any]) -> None:
            async for deltas in generation.deltas():
                found.append([delta.text for delta in deltas])

        async def from_writes(generation: Generation, found: list[Any]) -> None:
            async def write(piece: bytes) -> None:
                pieces = [json.loads(event[6:]) for event in piece.split(b"\n\n")[:-1]]
                found.append([piece["choices"][0]["text"] for piece in pieces])

            await write_chunks(
                write,
                generation,
                Usage(1, 0),
                1,
                None,
                lambda fields: Chunks({"id": "a", **fields}),
                lambda chunks, delta: chunks.of_text(0, delta.text, None, delta.finish),
            )

        written = asyncio.run(work(from_writes))
        assert written == asyncio.run(work(from_deltas))
        assert written == [[" one"], [" two", " " if stops else " three"]]

    def test_who_stops_reading_while_nothing_comes_aborts(self, base: BaseModel) -> None:
        async def work() -> SubmittedEngine:
            engine = SubmittedEngine()
            generation = generation_of(engine, base, choices=2)

            async def read() -> None:
                async with aclosing(generation.deltas()) as batches:
                    async for _ in batches:
                        pass

            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            on_a_thread(partial(put_in, engine.sinks[:1], Ended(FinishReason.STOP, TIMELINE)))
            await asyncio.sleep(0.01)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            return engine

        assert asyncio.run(work()).aborted == [("r-1", FinishReason.ABORT)]


def test_a_piece_of_several_events_is_sent_as_it_is() -> None:
    sent: list[dict[str, Any]] = []

    async def write_events(write: Write) -> None:
        await write(b'data: {"a":1}\n\ndata: {"a":2}\n\n')
        await write(b'data: {"a":3}\n\n')

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(EventStream(write_events, {})({"type": "http"}, receive, send))
    bodies = [message["body"] for message in sent[1:]]
    assert [body.count(b"data: ") for body in bodies] == [2, 1, 1, 0]
    assert events(b"".join(bodies)) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [message["more_body"] for message in sent[1:]] == [True, True, True, False]
