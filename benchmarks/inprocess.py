"""Running a started engine in this process: what is sent, when each token came, what was idle.

No HTTP and no tokeniser: what is timed is the engine. Token times are those of the engine's own
events, so the differences between consecutive tokens of one request are step times.

    decode()   n requests       [ prefill chunks ... | all decode: the window | aborted ]
    prefill()  n requests       [ prefill chunks ... ]  one token each
    serve()    many requests    k in flight, the next one is sent when one ends
"""

from __future__ import annotations

import platform
import random
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from pruning.loading import BaseModel, cache_folder, load_base_model
from pruning.quantised import is_on_grid, quantise, runs_here
from pruning.variants import Variants
from server.engine.ahead import COMPILER
from server.engine.assembly import EngineConfig, build_engine, default_limits
from server.engine.engine import Engine
from server.engine.request import Ended, Event, FinishReason, Request, SamplingParams, TokenEvent
from server.engine.scheduler import Limits
from server.engine.stats import EngineStats
from server.lifecycle import without_collecting_what_is_there

COMPILED = cache_folder() / "compiled"
"""Where a server keeps compiled layers."""
_PATIENCE = 600.0
"""Seconds without a token after which a run has failed."""

_SLACK = 32
"""Tokens that requests may generate beyond a window, so that none ends before it was looked at."""

Result = TypeVar("Result")

Mix = Mapping[str, int]
"""How many requests of each variant."""


def served_base(model: str) -> BaseModel:
    """Load a model as the server does by default: in four bits where that loses nothing."""
    base = load_base_model(model)
    if runs_here(base.device) and is_on_grid(base.model):
        quantise(base.model)
    return base


class DoesNotFitError(ValueError):
    """The requests cannot all be in the page pool, the context or the batch at once."""


@dataclass(frozen=True, slots=True)
class Running:
    """A started engine and what one must know to send it work."""

    engine: Engine
    vocabulary: int
    limits: Limits
    start_seconds: float
    """What it took to build the engine: pages, compiled layers, recorded steps."""

    def capacity(self, variant: str) -> int:
        """Return how many tokens of one variant the page pool holds."""
        return next(v.capacity_tokens for v in self.engine.describe() if v.name == variant)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Some consecutive steps in which every request got one token."""

    step_seconds: float
    """Median."""
    first_token_seconds: float
    """From the submission until every request had its first token."""
    contexts: Mapping[str, float]
    """Per variant: tokens with keys and values in the middle of the window, mean of its requests.
    Above what was asked for, since the first to be prefilled decode while others still are."""
    idle_share: float | None
    """Share of the device's time that passed between steps; None where it is not measured."""
    kv_bytes: int
    """Pages owned when the window begins."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts up to their first tokens."""

    seconds: float
    """From the submission until every request had its first token."""
    idle_share: float | None


@dataclass(frozen=True, slots=True)
class Served:
    """A load from its first submission to its last token."""

    seconds: float
    output_tokens: int
    step_seconds: float
    """Median between consecutive tokens of a request."""
    peak_kv_bytes: int
    """Pages owned in the steps in which some request got its last token, the most of them."""
    preemptions: int

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds


class TokenClock:
    """A sink that notes when each token came, and wakes whoever waits for one of them."""

    def __init__(self, awaited: Sequence[int] = (), watch: _Watch | None = None):
        """`awaited` are the token counts that may be waited for; `watch` is told of the end."""
        self.times: list[float] = []
        self.end: Ended | None = None
        self._reached = {count: threading.Event() for count in awaited}
        self._over = threading.Event()
        self._watch = watch

    def put(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.times.append(event.time)
            if reached := self._reached.get(len(self.times)):
                reached.set()
            if event.finish is not None and self._watch is not None:
                self._watch.last_token(event.time)
        elif isinstance(event, Ended):
            self.end = event
            for reached in self._reached.values():
                reached.set()
            self._over.set()
            if self._watch is not None:
                self._watch.ended.put(event)

    def wait_for(self, tokens: int) -> None:
        """Wait until this many tokens have come, one of the awaited counts.

        Raises:
            RuntimeError: the request ended before, or nothing came for long.
        """
        if not self._reached[tokens].wait(_PATIENCE):
            raise RuntimeError(f"token {tokens} did not come within {_PATIENCE:.0f} s")
        if len(self.times) < tokens:
            raise RuntimeError(f"a request ended before token {tokens}: {self.end}")

    def wait_end(self) -> None:
        """Wait until the request is over.

        Raises:
            RuntimeError: nothing came for long.
        """
        if not self._over.wait(_PATIENCE):
            raise RuntimeError(f"a request did not end within {_PATIENCE:.0f} s")


class _Watch:
    """What requests have in common that are served one after the other."""

    def __init__(self, engine: Engine) -> None:
        self.ended: SimpleQueue[Ended] = SimpleQueue()
        self.peak_kv_bytes = 0
        self._engine = engine
        self._looked: float | None = None

    def last_token(self, at: float) -> None:
        """Look at the pages, once a step: the request that is about to end still owns its own."""
        if at != self._looked:
            self._looked = at
            self.peak_kv_bytes = max(self.peak_kv_bytes, _kv_bytes(self._engine.stats()))

    def wait_for_end(self) -> None:
        """Wait until one more request is over.

        Raises:
            RuntimeError: the request failed, or none ended for long.
        """
        try:
            end = self.ended.get(timeout=_PATIENCE)
        except Empty as error:
            raise RuntimeError(f"no request ended within {_PATIENCE:.0f} s") from error
        if end.reason is not FinishReason.LENGTH:
            raise RuntimeError(f"a request failed: {end}")


def passing(work: Callable[[], Result]) -> Result:
    """Do work on a thread that ends: its OpenMP team would slow down that of the engine."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@contextmanager
def running(base: BaseModel, variants: Variants, config: EngineConfig) -> Iterator[Running]:
    """Yield a started engine, with all layers compiled that are to be, and stop it afterwards."""
    limits = config.limits or default_limits(base.device)
    before = time.monotonic()
    engine = passing(lambda: build_engine(base, variants, config))
    seconds = time.monotonic() - before
    for compiler in (thread for thread in threading.enumerate() if thread.name == COMPILER):
        compiler.join()
    with without_collecting_what_is_there():  # as in a server
        engine.start()
        try:
            yield Running(engine, base.model.config.vocab_size, limits, seconds)
        finally:
            engine.stop()


def decode(running: Running, mix: Mix, context: int, steps: int) -> Decoded:
    """Prefill requests, then time `steps` steps in which all of them decode, at a context of
    about `context` tokens in the middle.

    Raises:
        DoesNotFitError: the requests do not fit the pool, the context or the batch at once.
    """
    prompt = max(1, context - steps // 2)
    most = steps + 1 + _tokens_meanwhile(running, mix, prompt)
    _check_fits(running, mix, prompt + most)
    clocks, requests = _requests(running, mix, prompt, most, awaited=(1, steps + 1))
    start = running.engine.stats()
    sent = time.monotonic()
    running.engine.submit(requests)
    before = _wait_for_all(running, clocks, 1)
    after = _wait_for_all(running, clocks, steps + 1)
    for request in requests:
        running.engine.abort(request.id)
    for clock in clocks:
        clock.wait_end()
    if _preemptions(after) > _preemptions(start):
        raise DoesNotFitError(f"the page pool ran out with {_told(mix)} at {context} tokens")
    last = max(clocks, key=lambda clock: clock.times[0])
    window = last.times[: steps + 1]
    return Decoded(
        step_seconds=statistics.median(_gaps(window)),
        first_token_seconds=window[0] - sent,
        contexts=_contexts(requests, clocks, window),
        idle_share=_idle_share(before, after),
        kv_bytes=_kv_bytes(before),
    )


def prefill(running: Running, mix: Mix, prompt: int) -> Prefilled:
    """Time prompts that are submitted together, until each has its first and only token.

    Raises:
        DoesNotFitError: the requests do not fit the pool, the context or the batch at once.
    """
    _check_fits(running, mix, prompt + 1)
    clocks, requests = _requests(running, mix, prompt, 1, awaited=(1,))
    before = running.engine.stats()
    sent = time.monotonic()
    running.engine.submit(requests)
    after = _wait_for_all(running, clocks, 1)
    for clock in clocks:
        clock.wait_end()
    seconds = max(clock.times[0] for clock in clocks) - sent
    return Prefilled(seconds, _idle_share(before, after))


def serve(
    running: Running, variant: str, requests: int, prompt: int, output: int, in_flight: int
) -> Served:
    """Send `requests` requests of one variant, `in_flight` at a time, and wait for all of them."""
    watch = _Watch(running.engine)
    clocks, waiting = _requests(running, {variant: requests}, prompt, output, watch=watch)
    before = running.engine.stats()
    sent = time.monotonic()
    running.engine.submit(waiting[:in_flight])
    for request in waiting[in_flight:]:
        watch.wait_for_end()
        running.engine.submit([request])
    for _ in waiting[:in_flight]:
        watch.wait_for_end()
    return Served(
        seconds=max(clock.times[-1] for clock in clocks) - sent,
        output_tokens=sum(len(clock.times) for clock in clocks),
        step_seconds=statistics.median(gap for clock in clocks for gap in _gaps(clock.times)),
        peak_kv_bytes=watch.peak_kv_bytes,
        preemptions=_preemptions(running.engine.stats()) - _preemptions(before),
    )


def machine(device: torch.device) -> dict[str, str]:
    """Return what a measurement ran on: the device, and the versions of what it ran."""
    versions = {name: _version(name) for name in ("torch", "transformers", "triton", "attndrop")}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"device": name, "cuda": str(torch.version.cuda), **versions}
    return {"device": f"{_cpu_model()}, {torch.get_num_threads()} threads", **versions}


def _requests(
    running: Running,
    mix: Mix,
    prompt: int,
    output: int,
    awaited: Sequence[int] = (),
    watch: _Watch | None = None,
) -> tuple[list[TokenClock], list[Request]]:
    """Return requests of random tokens, the variants shuffled, and their sinks in that order."""
    draw = random.Random()
    names = [variant for variant, count in mix.items() for _ in range(count)]
    draw.shuffle(names)
    clocks = [TokenClock(awaited, watch) for _ in names]
    params = SamplingParams(max_tokens=output, temperature=0.0)
    requests = [
        Request(
            id=uuid.uuid4().hex,
            prompt=tuple(draw.choices(range(running.vocabulary), k=prompt)),
            variant=name,
            params=params,
            sink=clock,
            arrived=time.monotonic(),
        )
        for name, clock in zip(names, clocks, strict=True)
    ]
    return clocks, requests


def _tokens_meanwhile(running: Running, mix: Mix, prompt: int) -> int:
    """Return the most tokens that one request may decode while others are still prefilled."""
    count = sum(mix.values())
    budget = running.limits.tokens_per_step - count
    if budget <= 0:
        raise DoesNotFitError(
            f"a step of {running.limits.tokens_per_step} tokens leaves nothing for prompts "
            f"beside {count} decoding requests; raise the tokens per step"
        )
    return -(-count * prompt // budget) + _SLACK


def _check_fits(running: Running, mix: Mix, tokens: int) -> None:
    """Check that requests of `tokens` tokens can all run at once.

    Raises:
        DoesNotFitError: they cannot.
    """
    count, limit = sum(mix.values()), running.limits.running
    if count > limit:
        raise DoesNotFitError(f"{count} requests where {limit} run at most")
    share = sum(number * tokens / running.capacity(name) for name, number in mix.items())
    if share > 1:
        raise DoesNotFitError(f"{_told(mix)} of {tokens} tokens need {share:.2f} page pools")
    if tokens > (longest := min(running.engine.limit(name) for name in mix)):
        raise DoesNotFitError(f"sequences of {tokens} tokens where {longest} fit")


def _wait_for_all(running: Running, clocks: Sequence[TokenClock], tokens: int) -> EngineStats:
    """Wait until every request has this many tokens and return the engine's state then."""
    for clock in clocks:
        clock.wait_for(tokens)
    return running.engine.stats()


def _contexts(
    requests: Sequence[Request], clocks: Sequence[TokenClock], window: Sequence[float]
) -> dict[str, float]:
    """Return per variant the mean tokens in pages in the middle of the window.

    Raises:
        RuntimeError: a request ended within the window.
    """
    found: dict[str, list[float]] = {}
    for request, clock in zip(requests, clocks, strict=True):
        if clock.times[-1] < window[-1]:
            raise RuntimeError("a request ended while the others were being timed")
        generated = sum(at <= window[0] for at in clock.times)
        middle = len(request.prompt) + generated - 1 + (len(window) - 1) / 2
        found.setdefault(request.variant, []).append(middle)
    return {variant: statistics.mean(values) for variant, values in found.items()}


def _gaps(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def _idle_share(before: EngineStats, after: EngineStats) -> float | None:
    idle = after.device_idle_seconds - before.device_idle_seconds
    busy = after.device_busy_seconds - before.device_busy_seconds
    return idle / (idle + busy) if busy > 0 else None


def _kv_bytes(stats: EngineStats) -> int:
    return sum(variant.kv_bytes for variant in stats.variants)


def _preemptions(stats: EngineStats) -> int:
    return sum(variant.preemptions for variant in stats.variants)


def _told(mix: Mix) -> str:
    return " + ".join(f"{count} {variant}" for variant, count in mix.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    """Return the processor's name, as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
