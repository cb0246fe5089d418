"""The engine: one thread that schedules, runs and commits until it is told to stop.

The rest of the program knows three verbs: `submit`, `abort` and `stats`. They may be called from
any thread and never wait for a step. Every submitted request gets exactly one `Ended` event:

    submit --> waiting --> running --> Ended(stop | length)
                  ^           |------> Ended(error)          its own computation failed
                  |-preempted-|------> Ended(abort)          the client left, or shutdown
                                       Ended(error)          the engine itself died: all of them
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from queue import SimpleQueue

import torch

from pruning.variants import Variants
from server.engine.batch import Batch, Batches
from server.engine.pages import PageLayout
from server.engine.request import (
    Ended,
    FinishReason,
    PromptScored,
    Request,
    TokenEvent,
    TokenLogprobs,
)
from server.engine.runner import Launched, Runner, StepResult
from server.engine.scheduler import Scheduled, Scheduler
from server.engine.stats import EngineStats, VariantInfo, VariantStats

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine has stopped and takes no requests."""


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


class TooLongError(ValueError):
    """A request can never be computed within the context or the page pool."""


class Engine:
    """Continuous batching of requests of all variants on one model."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        variants: Variants,
        layout: PageLayout,
        context: int,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """context is the longest sequence in tokens; `on_death` is called from the engine's
        thread once it has died of an error."""
        self.variants = variants
        self.context = context
        self._scheduler = scheduler
        self._runner = runner
        self._layout = layout
        self._batches = Batches(variants, layout)
        self._page_bytes = runner.pool_bytes // scheduler.pages
        self._on_death = on_death
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()  # guards _alive and _submitted
        self._submitted = 0  # requests in commands that the thread has not taken yet
        self._requests: dict[str, Request] = {}
        self._preemptions = {variant.name: 0 for variant in variants}
        self._steps = 0
        self._in_flight: Launched | None = None
        self._alive = True
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Abort what is left, end the thread and wait for it."""
        self._commands.put(self._stop)
        self._thread.join()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all of them or none.

        Raises:
            EngineDeadError: the engine has stopped.
            TooLongError: a request would not fit the context or the page pool.
            QueueFullError: as many requests wait as may.
        """
        for request in requests:
            self._check_length(request)
        with self._lock:
            if not self._alive:
                raise EngineDeadError("the engine has stopped")
            waiting = self._scheduler.num_waiting + self._submitted
            if waiting + len(requests) > self._scheduler.limits.waiting:
                raise QueueFullError(
                    f"{waiting} requests are waiting and {self._scheduler.limits.waiting} may"
                )
            self._submitted += len(requests)
            self._commands.put(lambda: self._add(requests))

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request before its next step; a request that has ended is left alone."""
        self._commands.put(lambda: self._abort(request_id, reason))

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap, and consistent enough for monitoring."""
        scheduler = self._scheduler
        return EngineStats(
            alive=self._alive,
            pool_bytes=self._runner.pool_bytes,
            variants=tuple(
                VariantStats(
                    name=variant.name,
                    running=scheduler.running_of(variant.name),
                    waiting=scheduler.waiting_of(variant.name),
                    kv_bytes=self._page_bytes * scheduler.prefix_stats(variant.name).owned_pages,
                    preemptions=self._preemptions[variant.name],
                    cached_bytes=self._page_bytes
                    * scheduler.prefix_stats(variant.name).cached_pages,
                    prefix_asked_tokens=scheduler.prefix_stats(variant.name).asked_tokens,
                    prefix_hit_tokens=scheduler.prefix_stats(variant.name).hit_tokens,
                )
                for variant in self.variants
            ),
            steps=self._steps,
            device_busy_seconds=self._runner.device_time.busy,
            device_idle_seconds=self._runner.device_time.idle,
        )

    def describe(self) -> tuple[VariantInfo, ...]:
        """Return what each variant is, in the variants' order."""
        layers = self.variants.layers
        layer_bytes = self._page_bytes // self._tokens_times_layers()
        return tuple(
            VariantInfo(
                name=variant.name,
                attention_layers=len(variant.kept),
                dropped_layers=variant.dropped(layers),
                kv_bytes_per_token=len(variant.kept) * layer_bytes,
                capacity_tokens=self._scheduler.capacity(variant.name),
                dropped_mlps=tuple(sorted(variant.dropped_mlps)),
            )
            for variant in self.variants
        )

    @property
    def queue_limit(self) -> int:
        """How many requests may wait, and so how many can be submitted together."""
        return self._scheduler.limits.waiting

    def limit(self, variant: str) -> int:
        """Return the longest prompt and answer together, in tokens, that a request may have."""
        return min(self.context, self._scheduler.capacity(variant))

    def _tokens_times_layers(self) -> int:
        """Return how many (token, layer) pairs a page of the largest group holds."""
        sizes = [len(group.layers) for group in self.variants.groups]
        return max(s * t for s, t in zip(sizes, self._layout.tokens_per_page, strict=True))

    def _check_length(self, request: Request) -> None:
        tokens = len(request.prompt) + request.params.max_tokens
        limit = self.limit(request.variant)
        if tokens > limit:
            raise TooLongError(
                f"{len(request.prompt)} prompt tokens and {request.params.max_tokens} tokens to "
                f"generate make {tokens}, and at most {limit} fit"
            )

    # From here on, everything runs on the engine's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                self._step()
        except BaseException as error:  # the engine's death must reach every request
            logger.exception("the engine died")
            self._end_all(FinishReason.ERROR, f"the engine died: {error}")
            self._on_death()
        else:
            self._end_all(FinishReason.ABORT, None)

    def _take_commands(self) -> None:
        """Run the commands that are there; wait for one if there is nothing else to do."""
        idle = not self._scheduler.has_work and self._in_flight is None
        if idle and not self._stopping:
            self._runner.rest()
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _step(self) -> None:
        """Launch the next step, then commit the one before it.

        Where the device runs on its own, it computes step n + 1 while step n is committed::

            device   [ step n ][ step n + 1 ][ step n + 2 ]
            here     schedule n + 1  commit n | schedule n + 2  commit n + 1
        """
        step = self._schedule()
        launched = self._launch(step) if step else None
        if self._in_flight is not None:
            self._commit(self._in_flight)
        self._in_flight = launched
        if launched is not None and not self._runner.overlaps:
            self._commit_in_flight()

    def _schedule(self) -> tuple[Scheduled, ...]:
        step = self._scheduler.schedule()
        for victim in self._scheduler.preempted:
            self._preemptions[victim.variant] += 1
        now = time.monotonic()
        for scheduled in step:
            if scheduled.request.first_scheduled is None:
                scheduled.request.first_scheduled = now
        return step

    def _launch(self, step: Sequence[Scheduled]) -> Launched | None:
        """Start computing a step. If that fails, compute its requests one by one, to end only the
        guilty."""
        try:
            launched = self._runner.launch(self._batches.of(step))
        except torch.AcceleratorError:
            raise  # the device is lost, and with it every request
        except Exception as error:  # noqa: BLE001  one request's failure must not end the engine
            self._commit_in_flight()
            self._launch_apart(step, error)
            return None
        self._steps += 1
        self._advance(launched.batch)
        return launched

    def _advance(self, batch: Batch) -> None:
        """Note that a step is on its way: what it computes, and, where the next one is launched
        before they are known, which tokens it will bring."""
        self._scheduler.advance(batch.sequences)
        if not self._runner.overlaps:
            return
        for scheduled in batch.sequences:
            scheduled.request.pending = None
        for place, index in enumerate(batch.sampled):
            scheduled = batch.sequences[index]
            scheduled.request.pending, scheduled.request.pending_share = place, scheduled

    def _launch_apart(self, step: Sequence[Scheduled], error: Exception) -> None:
        """Compute each request of a failed step by itself, as far as it has not ended."""
        if len(step) == 1:
            logger.error("request %s failed", step[0].request.id, exc_info=error)
            self._end(step[0].request, FinishReason.ERROR, str(error) or repr(error))
            return
        for scheduled in step:
            if scheduled.request.id in self._requests:
                self._in_flight = self._launch([scheduled])
                self._commit_in_flight()

    def _commit_in_flight(self) -> None:
        if self._in_flight is not None:
            self._commit(self._in_flight)
            self._in_flight = None

    def _commit(self, launched: Launched) -> None:
        """Wait for a step, record what it computed and tell the requests that still listen."""
        batch, result = launched.batch, launched.result()
        now = time.monotonic()
        if batch.scored:
            self._commit_scores(batch, result)
        for place, index in enumerate(batch.sampled):
            scheduled = batch.sequences[index]
            request = scheduled.request
            if request.pending_share is scheduled:
                request.pending = request.pending_share = None
            if request.id in self._requests:
                self._commit_token(request, result.tokens[place], result.logprobs[place], now)
        if len(batch.sampled) < len(batch.sequences):
            for scheduled in batch.sequences:
                self._end_if_computed(scheduled.request)

    def _commit_token(
        self, request: Request, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> None:
        request.output.append(token)
        request.first_token = request.first_token or now
        finish = _finish_reason(request)
        request.sink.put(TokenEvent(token, logprobs, now, finish))
        if finish is not None:
            self._end(request, finish)

    def _end_if_computed(self, request: Request) -> None:
        """End a request that generates nothing once its prompt is computed."""
        is_open = request.params.max_tokens == 0 and request.id in self._requests
        if is_open and request.remaining == 0:
            self._end(request, FinishReason.LENGTH)

    def _commit_scores(self, batch: Batch, result: StepResult) -> None:
        scored = zip(batch.scored, result.prompt_logprobs, strict=True)
        for index, rows in groupby(scored, key=lambda pair: pair[0].sequence):
            request = batch.sequences[index].request
            if request.id in self._requests:
                scores = tuple(logprobs for _, logprobs in rows)
                request.num_scored_tokens += len(scores)
                request.sink.put(PromptScored(scores))

    def _add(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._submitted -= len(requests)
        for request in requests:
            self._requests[request.id] = request
            self._scheduler.add(request)

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        if request := self._requests.get(request_id):
            self._end(request, reason)

    def _stop(self) -> None:
        self._stopping = True

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        del self._requests[request.id]
        self._scheduler.remove(request)
        request.sink.put(_ended(request, reason, time.monotonic(), error))
        if not self._scheduler.has_work:
            self._scheduler.check_counts()

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        """Tell every request that has not ended, those still in the command queue included."""
        with self._lock:
            self._alive = False
        while not self._commands.empty():
            self._commands.get()()
        now = time.monotonic()
        for request in self._requests.values():
            request.sink.put(_ended(request, reason, now, error))
        self._requests.clear()


def _ended(request: Request, reason: FinishReason, now: float, error: str | None) -> Ended:
    return Ended(reason, request.timeline(now), error, request.cached_tokens)


def _finish_reason(request: Request) -> FinishReason | None:
    """Return why a request is over after its last token, if it is."""
    if request.output[-1] in request.params.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(request.output) == request.params.max_tokens else None
