"""Engines on tiny random models, and sinks that remember."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from pruning.families import kv_shape
from pruning.loading import BaseModel
from pruning.sublayers import wrap
from pruning.substitutes import Substitutes
from pruning.variants import FULL, Variant, Variants
from server.engine.assembly import EngineConfig, KvCacheDtype, build_engine, kv_dtype
from server.engine.engine import Engine
from server.engine.request import (
    Ended,
    Event,
    PromptScored,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from server.engine.scheduler import Limits
from tests.pruning.tiny_models import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from server.engine.eight_bits import Kind

LAYERS = 4
PAGE_TOKENS = 16


class Recorder:
    """A sink that keeps a request's events and tells when it ended."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def put(self, event: Event) -> None:
        assert not self._ended.is_set(), "an event after the end"
        self.events.append(event)
        if isinstance(event, Ended):
            self._ended.set()

    def wait(self, seconds: float = 60) -> Ended:
        assert self._ended.wait(seconds), "the request did not end"
        ended = self.events[-1]
        assert isinstance(ended, Ended)
        return ended

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, TokenEvent)]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        found = [event.logprobs for event in self.events if isinstance(event, TokenEvent)]
        return [entry for entry in found if entry is not None]

    @property
    def scores(self) -> list[float]:
        found = [event.logprobs for event in self.events if isinstance(event, PromptScored)]
        return [entry.logprob for scores in found for entry in scores]


@dataclass
class Numbered:
    """Makes requests with ids of their own."""

    count: int = field(default=0)

    def request(
        self, prompt: Sequence[int], variant: str = FULL, max_tokens: int = 8, **params: object
    ) -> Request:
        self.count += 1
        sampling = SamplingParams(max_tokens, **{"temperature": 0.0, **params})  # type: ignore[arg-type]
        return Request(
            str(self.count), tuple(prompt), variant, sampling, Recorder(), time.monotonic()
        )


def recorder(request: Request) -> Recorder:
    assert isinstance(request.sink, Recorder)
    return request.sink


def tiny_variants(layers: int = LAYERS, **dropped: set[int]) -> Variants:
    """Return `full` and variants that drop the given layers."""
    every = frozenset(range(layers))
    return Variants(
        layers, [Variant(FULL, every), *(Variant(n, every - d) for n, d in dropped.items())]
    )


def wrapped(model: PreTrainedModel) -> BaseModel:
    return BaseModel("tiny", model, tiny_tokenizer(False), "sha256:tiny", tuple(wrap(model)))


def tiny_engine(
    variants: Variants,
    *,
    family: str = "llama",
    pages: int = 64,
    limits: Limits | None = None,
    overlaps: bool = False,
    substitutes: Substitutes | None = None,
    kv_cache_dtype: KvCacheDtype = "auto",
) -> Engine:
    """Return a started float64 engine with exactly `pages` pages.

    With `overlaps`, each step is launched before the one ahead of it is committed, as on a GPU.
    """
    base = wrapped(tiny_model(family, layers=variants.layers).double())
    if substitutes is not None:
        substitutes.attach(base, substitutes.by_layer)
    config = EngineConfig(
        limits or Limits(),
        kv_cache_bytes=pages * _page_bytes(base, variants, kv_cache_dtype),
        kv_cache_dtype=kv_cache_dtype,
    )
    engine = build_engine(base, variants, config)
    engine._runner.overlaps = overlaps
    engine.start()
    return engine


def fast_engine(
    variants: Variants,
    *,
    family: str = "llama",
    pages: int = 64,
    limits: Limits | None = None,
    substitutes: Substitutes | None = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    weights: Kind | None = None,
    eager: bool = False,
    chunk_sizes: Sequence[int] | None = None,
) -> Engine:
    """Return a started float32 engine on the paged backend, with recorded steps: of these sizes
    where there are prompt chunks, by default on a GPU only.

    On a GPU if there is one, with compiled layers; else in Triton's interpreter. `weights` puts
    them into eight bits.
    """
    model = tiny_model(family, layers=variants.layers)
    base = wrapped(model.to("cuda") if torch.cuda.is_available() else model)  # type: ignore[arg-type]
    if weights is not None:
        from server.engine import eight_bits  # needs Triton, which not all engines here do

        eight_bits.quantise(base.model, weights)
    if substitutes is not None:
        substitutes.attach(base, substitutes.by_layer)
    config = EngineConfig(
        limits or Limits(running=4),
        kv_cache_bytes=pages * _page_bytes(base, variants, kv_cache_dtype),
        attention="paged",
        kv_cache_dtype=kv_cache_dtype,
        enforce_eager=eager,
    )
    engine = build_engine(base, variants, config)
    if chunk_sizes is not None:
        engine._runner._graphs.chunk_sizes = chunk_sizes
    engine.start()
    return engine


def _page_bytes(base: BaseModel, variants: Variants, kv_cache_dtype: KvCacheDtype) -> int:
    largest = max(len(group.layers) for group in variants.groups)
    element_bytes = kv_dtype(kv_cache_dtype, base.model.dtype).itemsize
    return largest * PAGE_TOKENS * kv_shape(base.model.config).bytes_per_token(element_bytes)
