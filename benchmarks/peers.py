"""Peers on the same model and the same work: what a user would otherwise run.

`transformers_generate` is plain transformers: `AutoModelForCausalLM.generate` on a static batch,
its own KV cache and its default attention. For models of random weights in this process,
`static_generate` is the same without a checkpoint, and `continuous_batching` is transformers' own
engine with its defaults (flash attention where that is installed).
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.requests import GenerationOutput
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
        return Timed(sent, (ended,) * load.output_tokens, load.output_tokens)
    return Timed(sent, tuple(clock.times[-load.output_tokens :]), load.output_tokens)


_BLOCK_TOKENS = 256
"""Tokens in a block of transformers' continuous batching, by default."""

Prompts = Sequence[Sequence[int]]
"""Token ids of equally long prompts."""


@dataclass(frozen=True, slots=True)
class PeerRun:
    """What a peer made of a load, or why it could not."""

    who: str
    tokens_per_second: float | None = None
    """Generated tokens over the time from the first prompt to the last token."""
    step_seconds: float | None = None
    """Median between consecutive tokens of a request."""
    error: str | None = None


PEER_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
)
"""What a peer that does not run here raises: no memory, no kernels, another version's API."""


def attempt(who: str, run: Callable[[], PeerRun]) -> PeerRun:
    """Run a peer and return its figures, or its error: a peer that fails is a result, too."""
    try:
        return run()
    except PEER_FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return PeerRun(who, error=f"{type(error).__name__}: {lines[0]}")
    finally:
        free_memory()


def bounded(who: str, seconds: float, run: Callable[..., PeerRun], *arguments: object) -> PeerRun:
    """Run a peer in a process of its own, which is ended after so many seconds.

    `run` is a function of a module, its arguments can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_attempt_and_send, args=(sender, who, run, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            found: PeerRun = receiver.recv()
            return found
        return PeerRun(who, error=f"not done after {seconds:g} s")
    except EOFError:
        process.join()
        return PeerRun(who, error=f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _attempt_and_send(
    sender: Connection, who: str, run: Callable[..., PeerRun], arguments: tuple[object, ...]
) -> None:
    sender.send(attempt(who, lambda: run(*arguments)))


def free_memory() -> None:
    """Give back what nothing refers to any more, so that the next one finds the device empty."""
    torch.compiler.reset()  # compiled layers keep the weights they were made for
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def static_generate(model: PreTrainedModel, prompts: Prompts, output: int) -> PeerRun:
    """Run plain `generate` on all prompts as one batch, after a short warm-up."""
    batch = torch.tensor(prompts, device=model.device)
    _generate(model, batch, min(output, 4))
    start = time.perf_counter()
    times = _generate(model, batch, output)
    seconds = time.perf_counter() - start
    tokens = len(prompts) * output
    return PeerRun("transformers generate", tokens / seconds, _median_gap([times]))


def _generate(model: PreTrainedModel, batch: torch.Tensor, output: int) -> list[float]:
    """Generate and return when each step's tokens were ready.

    Raises:
        RuntimeError: fewer tokens came than were asked for.
    """
    clock = _Clock()
    tokens = model.generate(  # type: ignore[operator]
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=output,
        do_sample=False,
        streamer=clock,
    ).cpu()
    if tokens.shape[1] != batch.shape[1] + output:
        raise RuntimeError(f"generate made {tokens.shape[1] - batch.shape[1]} of {output} tokens")
    return clock.times[1:]  # the streamer is given the prompt first


def continuous_batching(
    model: PreTrainedModel, warm_up: Prompts, prompts: Prompts, output: int
) -> PeerRun:
    """Run transformers' continuous batching on all prompts, after the same load of other prompts.

    Raises:
        RuntimeError: a request failed or got fewer tokens than were asked for.
    """
    with _kept_manager(model):
        _batched(model, warm_up, output)
        results = _batched(model, prompts, output)
    times = [list(result.timestamps or ()) for result in results]
    start = min(result.created_time for result in results)
    seconds = max(each[-1] for each in times) - start
    tokens = len(prompts) * output
    return PeerRun("transformers continuous batching", tokens / seconds, _median_gap(times))


@contextmanager
def _kept_manager(model: PreTrainedModel) -> Iterator[None]:
    """Free at the end what `persistent_manager` keeps between calls: cache, graphs, thread."""
    try:
        yield
    finally:
        model.destroy_cached_continuous_batching_manager()  # type: ignore[operator]


def _batched(model: PreTrainedModel, prompts: Prompts, output: int) -> list[GenerationOutput]:
    """Return what `generate_batch` made of each prompt, times by `time.perf_counter` included."""
    results: list[GenerationOutput] = list(
        model.generate_batch(  # type: ignore[operator]
            [list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                max_new_tokens=output, do_sample=False
            ),
            continuous_batching_config=_batching_config(model.device, prompts, output),
            record_timestamps=True,
            persistent_manager=True,
        ).values()
    )
    if failed := [result.error for result in results if result.error is not None]:
        raise RuntimeError(f"{len(failed)} of {len(prompts)} requests failed: {failed[0]}")
    counts = [len(result.generated_tokens) for result in results]
    if counts != [output] * len(prompts):
        raise RuntimeError(f"{len(prompts)} requests of {output} tokens each got {counts}")
    return results


def _batching_config(
    device: torch.device, prompts: Prompts, output: int
) -> ContinuousBatchingConfig:
    """Return the peer's defaults; on a CPU, whose memory it would take whole, a cache of this
    load's size."""
    if device.type != "cpu":
        return ContinuousBatchingConfig()
    tokens = len(prompts[0]) + output
    blocks = len(prompts) * (tokens // _BLOCK_TOKENS + 1)
    return ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=len(prompts) * tokens)


def _median_gap(times: Sequence[Sequence[float]]) -> float:
    return statistics.median(after - before for each in times for before, after in pairwise(each))
