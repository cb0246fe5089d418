"""What each precision costs in quality and gives in speed and bytes, on a CPU.

    python -m benchmarks.quantised --text TEXT.txt

Perplexity, KL(float32 || mode) and top-1 agreement are over next tokens of the same text; float32
comes first and is what the others are compared with. Decode speed is that of the engine in this
process, at --context tokens.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.inprocess import decode, machine, passing, prefill, running
from pruning.calibration import calibrate
from pruning.loading import EMBEDDED_MODEL, BaseModel, cache_folder, load_base_model
from pruning.quantised import EightBitHead, four_bit_layers, quantise
from pruning.variants import FULL, Variant, Variants
from server.engine.ahead import CompiledLayers
from server.engine.assembly import EngineConfig

COMPILED = "int4-compiled"
"""int4 as served once the layers are compiled; quality is that of the uncompiled layers."""
MODES = ("float32", "bfloat16", "int4", COMPILED)


@dataclass(frozen=True, slots=True)
class Row:
    """One precision."""

    mode: str
    perplexity: float
    perplexity_ratio: float
    kl: float
    agreement: float
    weight_bytes: int
    """Of the weights that a decode step of one row reads."""
    kv_bytes_per_token: int
    tokens_per_second: dict[int, float]
    """By requests that decode together."""
    prefill_tokens_per_second: float


def main(
    text: Annotated[str, typer.Option(help="Text to measure on: a file, self, or hf:NAME.")],
    model: Annotated[str, typer.Option(help="What to measure.")] = EMBEDDED_MODEL,
    modes: Annotated[str, typer.Option(help="Precisions; float32 must be the first.")] = (
        ",".join(MODES)
    ),
    windows: int = 8,
    length: int = 512,
    batch: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8",
    context: int = 64,
    repeats: int = 3,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure precisions."""
    batches = [int(part) for part in batch.split(",")]
    first = passing(lambda: _loaded(model, "float32"))
    tokens = passing(
        lambda: calibrate(text, first, samples=windows, length=length, seed=1).token_ids
    )
    exact = passing(lambda: [_logprobs(first, window) for window in tokens])
    rows: list[Row] = []
    for mode in track(modes.split(","), description="measuring"):
        base = first if mode == "float32" else passing(partial(_loaded, model, mode))
        quality = passing(partial(_quality, base, tokens, exact))
        rows.append(_row(mode, base, quality, batches, context, repeats, rows))
    _print(rows, batches)
    if output is not None:
        body = {"machine": machine(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


def _loaded(model: str, mode: str) -> BaseModel:
    dtype = "float32" if mode.startswith("int4") else mode
    base = load_base_model(model, dtype=dtype, device="cpu")
    if mode.startswith("int4"):
        quantise(base.model)
    if mode == COMPILED:
        CompiledLayers(base.model, cache_folder() / "compiled").compile_missing()
    return base


@torch.inference_mode()
def _logprobs(base: BaseModel, window: Tensor) -> Tensor:
    """Return [length - 1, vocabulary] log probabilities of the next tokens."""
    return torch.log_softmax(base.model(window[None]).logits[0, :-1].float(), dim=-1)


def _quality(base: BaseModel, tokens: Tensor, exact: list[Tensor]) -> tuple[float, float, float]:
    """Return perplexity, KL and agreement, four-bit layers on the kernel of few rows."""
    loss = kl = agreed = 0.0
    for window, true in zip(tokens, exact, strict=True):
        few = patch.multiple("pruning.quantised", FEW_ROWS=len(window), _FEW_HEAD_ROWS=len(window))
        with few:
            found = _logprobs(base, window)
        loss -= float(found.gather(1, window[1:, None]).sum())
        kl += float((true.exp() * (true - found)).sum())
        agreed += float((true.argmax(-1) == found.argmax(-1)).sum())
    count = len(exact) * (tokens.shape[1] - 1)
    return math.exp(loss / count), kl / count, agreed / count


def _row(
    mode: str,
    base: BaseModel,
    quality: tuple[float, float, float],
    batches: list[int],
    context: int,
    repeats: int,
    before: list[Row],
) -> Row:
    perplexity, kl, agreement = quality
    variants = Variants(base.layers, [Variant(FULL, frozenset(range(base.layers)))])
    with running(base, variants, EngineConfig(kv_cache_bytes=1 << 29)) as engine:
        steps = {
            size: statistics.median(
                decode(engine, {FULL: size}, context, 32).step_seconds for _ in range(repeats)
            )
            for size in batches
        }
        chunk = statistics.median(
            prefill(engine, {FULL: 1}, 512).seconds for _ in range(repeats + 1)
        )
        per_token = engine.engine.describe()[0].kv_bytes_per_token
    return Row(
        mode=mode,
        perplexity=perplexity,
        perplexity_ratio=perplexity / (before[0].perplexity if before else perplexity),
        kl=kl,
        agreement=agreement,
        weight_bytes=_weight_bytes(base),
        kv_bytes_per_token=per_token,
        tokens_per_second={size: size / seconds for size, seconds in steps.items()},
        prefill_tokens_per_second=512 / chunk,
    )


def _weight_bytes(base: BaseModel) -> int:
    """Return the bytes of the decoder layers' weights and the head, as a step of one row reads."""
    model: Any = base.model
    head = model.get_output_embeddings()
    total = int(head.step_bytes if isinstance(head, EightBitHead) else head.weight.nbytes)
    layers = model.get_decoder().layers
    total += sum(parameter.nbytes for parameter in layers.parameters())
    return int(total + sum(linear.step_bytes for linear in four_bit_layers(model)))


def _print(rows: list[Row], batches: list[int]) -> None:
    table = Table(title="precisions")
    headings = ("mode", "perplexity", "ratio", "KL nats", "agreement", "weights MB", "KV B/token")
    for heading in (*headings, *(f"tokens/s at {size}" for size in batches), "prefill tokens/s"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for row in rows:
        table.add_row(
            row.mode,
            f"{row.perplexity:.3f}",
            f"{row.perplexity_ratio:.4f}",
            f"{row.kl:.5f}",
            f"{row.agreement:.4f}",
            f"{row.weight_bytes / 1e6:.0f}",
            f"{row.kv_bytes_per_token:,}",
            *(f"{row.tokens_per_second[size]:.1f}" for size in batches),
            f"{row.prefill_tokens_per_second:.0f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
