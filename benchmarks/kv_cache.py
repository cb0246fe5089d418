"""What a KV cache in eight bits costs in quality, and gives in bytes and time.

    python -m benchmarks.kv_cache --text TEXT.txt --drop 50% --batch 1,8 --context 2048

The engine itself scores windows of a text, a few tokens a step (--chunk), so that most keys and
values come out of pages, as in decoding. Perplexity, KL(auto || fp8) and top-1 agreement are over
next tokens, by full distributions, each variant beside itself on pages of the model's dtype. Steps
of decoding are of random tokens at --context.
"""

from __future__ import annotations

import json
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import predictions
from benchmarks.inprocess import Running, TokenClock, decode, machine, passing, running
from benchmarks.peers import free_memory
from benchmarks.step import limits_for, times
from pruning.calibration import calibrate
from pruning.cli import progress_bars
from pruning.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from pruning.variants import Variants
from server.config import Settings, parse_bytes
from server.engine.assembly import EngineConfig, KvCacheDtype, kv_dtype
from server.engine.batch import ScoredRow
from server.engine.request import FinishReason, Request, SamplingParams
from server.engine.sampling import Scores, prompt_scores
from server.planned import attach_substitutes
from server.startup import find_plan, make_variants, plan_variants

DTYPES: tuple[KvCacheDtype, ...] = ("auto", "fp8")
_STEPS = 32


@dataclass(frozen=True, slots=True)
class Work:
    """What is measured on each KV cache."""

    windows: Tensor
    """[windows, length] token ids."""
    chunk: int
    """Tokens scored a step."""
    batches: tuple[int, ...]
    """Requests that decode together."""
    context: int
    repeats: int
    pool_bytes: int | None
    """None takes what an engine takes by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One variant on one KV cache."""

    logprobs: tuple[Tensor, ...]
    """Of each window, [length - 1, vocabulary]: the next tokens' distributions, on the CPU."""
    kv_bytes_per_token: int
    capacity_tokens: int
    step_seconds: Mapping[int, float]
    """By requests that decode together."""


@dataclass(frozen=True, slots=True)
class Row:
    """One variant on one KV cache, beside the same variant on the model's dtype."""

    variant: str
    kv_cache_dtype: str
    perplexity: float
    perplexity_ratio: float
    kl: float
    agreement: float
    kv_bytes_per_token: int
    capacity_tokens: int
    step_seconds: Mapping[int, float]
    over_auto: Mapping[int, float]
    """Time of a step on the model's dtype over this one's."""


def main(
    text: Annotated[str, typer.Option(help="Text to measure on: a file, self, or hf:NAME.")],
    model: Annotated[str, typer.Option(help="What to measure.")] = EMBEDDED_MODEL,
    plan: Annotated[str | None, typer.Option(help="A plan file; by default the server's.")] = None,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "50%",
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens scored a step.")] = 64,
    batch: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    kv_memory: Annotated[str | None, typer.Option(help="Page pool, such as 40GiB.")] = None,
    device: str = "auto",
    dtype: str = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure KV caches."""
    given: dict[str, Any] = {"model": model, "plan": plan, "drop": drop}
    given |= {"dtype": dtype, "device": device}
    try:
        settings = Settings(**given)
        batches = tuple(int(part) for part in batch.split(","))
        pool_bytes = parse_bytes(kv_memory)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    found: dict[KvCacheDtype, dict[str, Measured]] = {}
    for each in DTYPES:
        base, variants = passing(partial(_loaded, settings))
        tokens = passing(partial(_windows, text, base, windows, length))
        work = Work(tokens, chunk, batches, context, repeats, pool_bytes)
        found[each] = measure(base, variants, each, work)
        Console(stderr=True).print(f"measured {each}", style="dim")
        stored = {name: str(kv_dtype(name, base.model.dtype)).split(".")[1] for name in DTYPES}
        on = machine(base.device)
        del base
        free_memory()
    rows = passing(lambda: compared(found, tokens, stored))
    title = f"{model}, {drop} dropped by pruned, {windows} windows of {length} tokens"
    _print(f"{title} in chunks of {chunk}, on {on['device']}; steps at {context} tokens", rows)
    if output is not None:
        setting = {"model": model, "text": text, "drop": drop, "windows": windows}
        setting |= {"length": length, "chunk": chunk, "context": context}
        body = {"machine": on, "setting": setting, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


def _loaded(settings: Settings) -> tuple[BaseModel, Variants]:
    """Return a model and variants as the server has them, substitutes in their places."""
    base = load_base_model(settings.model, dtype=settings.dtype, device=settings.device)
    with progress_bars() as progress:
        plan, substitutes, _ = find_plan(settings, base, progress)
    planned = plan_variants(settings, base, plan, substitutes)
    attach_substitutes(base, planned)
    return base, make_variants(settings, planned)


def _windows(text: str, base: BaseModel, windows: int, length: int) -> Tensor:
    return calibrate(text, base, samples=windows, length=length, seed=1).token_ids


def measure(
    base: BaseModel, variants: Variants, kv_cache_dtype: KvCacheDtype, work: Work
) -> dict[str, Measured]:
    """Return what each variant is on one KV cache."""
    limits = limits_for(max(work.batches), base.device, None)
    config = EngineConfig(
        replace(limits, scored_tokens_per_step=work.chunk),
        work.pool_bytes,
        prefix_caching=False,
        kv_cache_dtype=kv_cache_dtype,
    )
    with running(base, variants, config) as engine:
        return {
            info.name: Measured(
                tuple(score(engine, info.name, window) for window in work.windows),
                info.kv_bytes_per_token,
                info.capacity_tokens,
                {size: _step_seconds(engine, info.name, size, work) for size in work.batches},
            )
            for info in engine.engine.describe()
        }


def score(engine: Running, variant: str, window: Tensor) -> Tensor:
    """Return the engine's next-token distributions on a window, [length - 1, vocabulary].

    Raises:
        RuntimeError: the request failed.
    """
    clock, params = TokenClock(), SamplingParams(0, prompt_logprobs=0)
    prompt = tuple(window.tolist())
    request = Request(uuid.uuid4().hex, prompt, variant, params, clock, time.monotonic())
    with _distributions() as parts:
        engine.engine.submit([request])
        clock.wait_end()
    if clock.end is None or clock.end.reason is not FinishReason.LENGTH:
        raise RuntimeError(f"a window was not scored: {clock.end}")
    return torch.cat(parts)


@contextmanager
def _distributions() -> Iterator[list[Tensor]]:
    """Yield what engines find the distributions of scored prompt tokens to be, step by step."""
    parts: list[Tensor] = []

    def keep(logits: Tensor, rows: Sequence[ScoredRow]) -> Scores | None:
        parts.append(torch.log_softmax(logits, dim=-1).cpu())
        return prompt_scores(logits, rows)

    with patch("server.engine.runner.prompt_scores", keep):
        yield parts


def _step_seconds(engine: Running, variant: str, batch: int, work: Work) -> float:
    """Return the median of some windows of decoding, after a short one."""
    decode(engine, {variant: batch}, _STEPS, 8)
    runs = [decode(engine, {variant: batch}, work.context, _STEPS) for _ in range(work.repeats)]
    return statistics.median(run.step_seconds for run in runs)


def compared(
    found: Mapping[KvCacheDtype, Mapping[str, Measured]],
    windows: Tensor,
    stored: Mapping[KvCacheDtype, str],
) -> list[Row]:
    """Return each variant on each KV cache beside itself on `auto`; `stored` names the dtypes."""
    return [
        _row(name, stored[each], found[each][name], auto, windows)
        for name, auto in found["auto"].items()
        for each in found
    ]


def _row(variant: str, stored: str, this: Measured, auto: Measured, windows: Tensor) -> Row:
    quality = predictions.compared(windows, auto.logprobs, this.logprobs)
    own = predictions.compared(windows, auto.logprobs, auto.logprobs)
    return Row(
        variant=variant,
        kv_cache_dtype=stored,
        perplexity=quality.perplexity,
        perplexity_ratio=quality.perplexity / own.perplexity,
        kl=quality.kl,
        agreement=quality.agreement,
        kv_bytes_per_token=this.kv_bytes_per_token,
        capacity_tokens=this.capacity_tokens,
        step_seconds=this.step_seconds,
        over_auto={n: auto.step_seconds[n] / seconds for n, seconds in this.step_seconds.items()},
    )


def _print(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=title)
    headings = ("variant", "KV cache", "perplexity", "ratio", "KL nats", "agreement", "KV B/token")
    steps = [f"{what} at {n}" for n in rows[0].step_seconds for what in ("step ms", "over auto")]
    for heading in (*headings, "capacity", *steps):
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in rows:
        table.add_row(
            row.variant,
            row.kv_cache_dtype,
            f"{row.perplexity:.3f}",
            f"{row.perplexity_ratio:.4f}",
            f"{row.kl:.5f}",
            f"{row.agreement:.4f}",
            f"{row.kv_bytes_per_token:,}",
            f"{row.capacity_tokens:,}",
            *(
                cell
                for n, seconds in row.step_seconds.items()
                for cell in (f"{seconds * 1e3:.2f}", times(row.over_auto[n]))
            ),
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    typer.run(main)
