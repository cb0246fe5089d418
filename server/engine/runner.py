"""The runner: one forward pass a step, and the tokens that come out of it.

Owns everything on the device: the wrapped model, the page pool, the attention backend. Used from
the engine thread alone. Knows nothing of queues or streams.

`launch` only queues work on a device that computes on its own. The tokens stay there and feed the
next step, which may be launched before they are read::

    last tokens   [ 17 | 4 | 250 | ... ]      written at the end of a step
    next step     row 0 from place 2, row 1 given by the host, ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pruning.attention import Attend
from pruning.sublayers import last_rows
from server.engine.attention import AttentionBackend
from server.engine.batch import Batch
from server.engine.device_time import DeviceTime, Span
from server.engine.request import TokenLogprobs
from server.engine.sampling import (
    Scores,
    generated_scores,
    is_plain_greedy,
    most_likely,
    prompt_scores,
    sample,
)
from server.engine.transfer import download, upload

_FEWEST_ROWS = 2
"""Rows that go on to the end of a model at least, needed or not: for one alone, compiled layers
would be compiled once more, in the middle of serving."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed."""

    tokens: tuple[int, ...]
    """One for each of the batch's `sampled`."""
    logprobs: tuple[TokenLogprobs | None, ...]
    """One for each of the batch's `sampled`."""
    prompt_logprobs: tuple[TokenLogprobs, ...]
    """One for each of the batch's `scored`."""


class Launched(Protocol):
    """A step that is being computed."""

    batch: Batch

    def result(self) -> StepResult:
        """Wait for the step and return what it computed. To be called once."""
        ...


class Runner(Protocol):
    """Runs batches, one after the other, on one model."""

    overlaps: bool
    """Whether `launch` returns while the device still computes, so that the next step may be
    launched before this one's result is read."""
    device_time: DeviceTime

    @property
    def pool_bytes(self) -> int: ...

    def launch(self, batch: Batch) -> Launched:
        """Start computing a batch: keys and values into their pages, and its new tokens."""
        ...

    def rest(self) -> None:
        """Note that there is no work: what passes until the next step is no idle time."""
        ...


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A recorded step whose inputs are in place."""

    run: Callable[[], None]
    """Computes it and leaves the most likely tokens in the last tokens."""
    places: NDArray[np.int64]
    """Of each sequence there."""


class StepGraphs(Protocol):
    """Steps of few rows that were recorded once and are replayed."""

    logits: Tensor
    """[places, vocabulary] of the last step that ran."""

    def prepare(self, batch: Batch, sources: NDArray[np.int64]) -> RecordedStep | None:
        """Bring a batch's inputs to the device; None if nothing is recorded for such a batch."""
        ...


class ModelRunner:
    """Runs the model's own modules, on any device; few rows by recorded graphs if there are."""

    def __init__(
        self,
        model: Callable[..., Any],
        pool: Tensor,
        backend: AttentionBackend,
        attend: Attend,
        last_tokens: Tensor,
        graphs: StepGraphs | None = None,
        *,
        overlaps: bool,
    ) -> None:
        """pool is [pages, page_elements], the memory that `backend` works on; `attend` is what the
        model is given, `backend` itself or what stands for it; last_tokens has a place for every
        request that may run."""
        self.overlaps = overlaps
        self.device_time = DeviceTime()
        self._model = model
        self._pool = pool
        self._backend = backend
        self._attend = attend
        self._last_tokens = last_tokens
        self._graphs = graphs
        self._places = np.empty(0, dtype=np.int64)
        self._newest: Span | None = None

    @property
    def pool_bytes(self) -> int:
        return self._pool.numel() * self._pool.element_size()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        sources = self._sources(batch)
        recorded = None if self._graphs is None else self._graphs.prepare(batch, sources)
        span = Span(self._newest) if self._pool.device.type == "cuda" else None
        if recorded is None:
            step = self._eager(batch, sources)
        else:
            recorded.run()
            step = self._replayed(batch, recorded.places)
        if span is not None:
            span.close()
        step.span, step.device_time = span, self.device_time
        self._newest = span
        if self.overlaps:
            self._places = step.places
        return step

    def rest(self) -> None:
        self._newest = None

    def _sources(self, batch: Batch) -> NDArray[np.int64]:
        """Return for each row the place of its token among the last tokens, or -1."""
        sources = batch.sources
        if not len(self._places):
            return sources
        return np.where(sources >= 0, self._places[sources], -1)

    def _eager(self, batch: Batch, sources: NDArray[np.int64]) -> _Step:
        self._backend.prepare(batch)
        logits = self._logits(batch, sources)
        count = len(batch.sampled)
        generated = prompt = None
        if not batch.scored and all(map(is_plain_greedy, batch.sampling)):
            tokens = most_likely(logits)
        else:
            logits = logits.float()
            tokens = sample(logits[:count], batch.sampling)
            generated = generated_scores(logits[:count], batch.sampling, tokens)
            prompt = prompt_scores(logits[count:], batch.scored)
        if self.overlaps:
            self._last_tokens[:count] = tokens
            tokens = download(tokens)
        return _Step(batch, np.arange(count), tokens, generated, prompt)

    def _replayed(self, batch: Batch, places: NDArray[np.int64]) -> _Step:
        places = places[list(batch.sampled)]
        scores = None
        if self._graphs is not None and not all(map(is_plain_greedy, batch.sampling)):
            index = upload(places, torch.long, self._pool.device)
            logits = self._graphs.logits[index].float()
            tokens = sample(logits, batch.sampling)
            self._last_tokens[index] = tokens
            scores = generated_scores(logits, batch.sampling, tokens)
        end = places.max(initial=-1) + 1
        return _Step(batch, places, download(self._last_tokens[:end]), scores, None)

    def _logits(self, batch: Batch, sources: NDArray[np.int64]) -> Tensor:
        """Return the logits of the rows that need them, [logit rows, vocabulary]."""
        device = self._pool.device
        ids = upload(batch.token_ids, torch.long, device)
        if self.overlaps and (sources >= 0).any():
            ids = known_tokens(ids, upload(sources, torch.long, device), self._last_tokens)
        rows = upload(batch.logit_rows, torch.long, device)
        last = None
        if len(rows) < len(batch.token_ids):  # else every row is wanted
            going_on = functional.pad(rows, (0, max(0, _FEWEST_ROWS - len(rows))))
            last = last_rows(batch.attending_rows, batch.mlp_rows, len(batch.token_ids), going_on)
        output = self._model(
            ids[None],
            position_ids=upload(batch.positions, torch.long, device)[None],
            attend=self._attend,
            attending_rows=batch.attending_rows,
            mlp_rows=batch.mlp_rows,
            last=last,
            logits_to_keep=rows if last is None else torch.arange(len(rows), device=device),
        )
        return output.logits[0]  # type: ignore[no-any-return]


def known_tokens(given: Tensor, sources: Tensor, last_tokens: Tensor) -> Tensor:
    """Return the rows' tokens: the given ones, and where a source is not -1 the last tokens'."""
    return torch.where(sources >= 0, last_tokens[sources.clamp(min=0)], given)


@dataclass(slots=True)
class _Step:
    """A launched step, whose results are on their way to the host."""

    batch: Batch
    places: NDArray[np.int64]
    """Of each sampled token in `tokens`."""
    tokens: Tensor
    generated: Scores | None
    prompt: Scores | None
    span: Span | None = None
    device_time: DeviceTime | None = None

    def result(self) -> StepResult:
        self._wait()
        tokens = self.tokens.numpy()[self.places].tolist()
        generated = iter(() if self.generated is None else self.generated.read())
        return StepResult(
            tokens=tuple(tokens),
            logprobs=tuple(
                None if row.params.logprobs is None else next(generated)
                for row in self.batch.sampling
            ),
            prompt_logprobs=() if self.prompt is None else tuple(self.prompt.read()),
        )

    def _wait(self) -> None:
        if self.span is not None and self.device_time is not None:
            self.span.wait()
            self.device_time.add(self.span)
