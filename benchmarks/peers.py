"""Peers on the same model and the same work: what a user would otherwise run.

`transformers_generate` is plain transformers: `AutoModelForCausalLM.generate` on a static batch,
its own KV cache and its default attention.
"""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.load import Load, Measured, Timed
from pruning.families import kv_shape
from pruning.loading import BaseModel


class _Clock(BaseStreamer):
    """Notes when each token of a batch is ready."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def plain_model(base: BaseModel) -> torch.nn.Module:
    """Load the same checkpoint again, without this project's wrapping."""
    model = AutoModelForCausalLM.from_pretrained(
        base.model.config._name_or_path, dtype=base.model.dtype
    )
    torch.nn.Module.to(model, base.device)
    return torch.nn.Module.eval(model)


@torch.inference_mode()
def transformers_generate(base: BaseModel, model: torch.nn.Module, load: Load) -> Measured:
    """Run a load in static batches of its concurrency."""
    timed: list[Timed] = []
    prompts = load.prompts()
    start = time.perf_counter()
    for first in range(0, len(prompts), load.concurrency):
        batch = torch.tensor(prompts[first : first + load.concurrency], device=base.device)
        clock = _Clock() if len(batch) == 1 else None
        sent = time.perf_counter()
        model.generate(  # type: ignore[operator]
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=load.output_tokens,
            min_new_tokens=load.output_tokens,
            do_sample=False,
            streamer=clock,
        )
        ended = time.perf_counter()
        timed.extend([_timed(sent, ended, clock, load)] * len(batch))
    shape = kv_shape(base.model.config)
    per_token = shape.layers * shape.bytes_per_token(base.model.dtype.itemsize)
    held = (load.prompt_tokens + load.output_tokens) * load.concurrency * per_token
    return Measured(tuple(timed), time.perf_counter() - start, float(held))


def _timed(sent: float, ended: float, clock: _Clock | None, load: Load) -> Timed:
    """Return a request's times; a batch of several shows its tokens only when all are done."""
    if clock is None:
        return Timed(sent, (ended,) * load.output_tokens)
    return Timed(sent, tuple(clock.times[-load.output_tokens :]))
