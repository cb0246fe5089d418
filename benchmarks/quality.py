"""What dropping costs in quality: each variant beside the full model on the same text.

    python -m benchmarks.quality --text TEXT.txt --drop 0,4,8,15

Perplexity is over next tokens in windows of the text. KL and agreement compare each variant's
next-token distribution with the full model's at the same position: KL(full || variant) in nats,
and how often both find the same token most likely. Multiple-choice scores hide much of this; text
that people would read does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pruning.calibration import calibrate
from pruning.cli import plan_cache, progress_bars
from pruning.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from pruning.plan import Plan, parse_drop
from pruning.plan_cache import PlanRequest
from pruning.sublayers import rows_attending


@dataclass(frozen=True, slots=True)
class Quality:
    """One variant's figures over all predicted tokens."""

    dropped: int
    perplexity: float
    kl: float
    agreement: float
    tokens: int


@dataclass(slots=True)
class _Sums:
    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, full: Tensor, variant: Tensor, targets: Tensor) -> None:
        """Add positions: log probabilities [positions, vocabulary] and the true next tokens."""
        self.loss -= float(variant.gather(1, targets[:, None]).double().sum())
        self.kl += float((full.exp() * (full - variant)).double().sum())
        self.agreed += int((full.argmax(-1) == variant.argmax(-1)).sum())
        self.tokens += len(targets)

    def quality(self, dropped: int) -> Quality:
        count = self.tokens
        perplexity = math.exp(self.loss / count)
        return Quality(dropped, perplexity, self.kl / count, self.agreed / count, count)


def main(
    text: Annotated[str, typer.Option(help="Text to measure on: a file, self, or hf:NAME.")],
    model: Annotated[str, typer.Option(help="What to measure.")] = EMBEDDED_MODEL,
    drop: Annotated[str, typer.Option(help="How much to drop, each: numbers or shares.")] = "0,25%",
    calibration: Annotated[str, typer.Option(help="What the plan is measured on.")] = "self",
    windows: int = 24,
    length: int = 512,
    dtype: str = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure quality against layers dropped."""
    base = load_base_model(model, dtype=dtype)
    with progress_bars() as progress:
        request = PlanRequest(calibration=(calibration,))
        plan, _ = plan_cache().load_or_compute(base, request, progress)
        tokens = calibrate(text, base, samples=windows, length=length, seed=1).token_ids
    most = len(plan.ranking)
    counts = [parse_drop(part, layers=base.layers, most=most) for part in drop.split(",")]
    rows = measure(base, plan, counts, tokens)
    _print(rows, base.layers)
    if output is not None:
        body = {"plan": plan.id, "text": text, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


@torch.inference_mode()
def measure(base: BaseModel, plan: Plan, counts: list[int], tokens: Tensor) -> list[Quality]:
    """Return each count's quality on tokens [windows, length]."""
    sums = {count: _Sums() for count in counts}
    for window in track(tokens, description="measuring quality"):
        full = _logprobs(base, window, frozenset())
        for count in counts:
            variant = _logprobs(base, window, plan.dropped_layers(count)) if count else full
            for part in _slices(len(window) - 1):
                sums[count].add(full[part], variant[part], window[1:][part].to(full.device))
    return [sums[count].quality(count) for count in counts]


def _logprobs(base: BaseModel, window: Tensor, dropped: frozenset[int]) -> Tensor:
    """Return [length - 1, vocabulary] log probabilities of the next tokens, in float32."""
    rows = rows_attending(base.layers, len(window), dropped)
    logits = base.model(window[None].to(base.device), attending_rows=rows).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _slices(count: int) -> Iterator[slice]:
    """Yield slices of 128 positions, so that temporaries stay small."""
    for start in range(0, count, 128):
        yield slice(start, min(start + 128, count))


def _print(rows: list[Quality], layers: int) -> None:
    full = next((row for row in rows if row.dropped == 0), None)
    table = Table(title=f"{rows[0].tokens:,} predicted tokens")
    for heading in ("dropped", "perplexity", "of full", "KL nats", "top-1 agreement"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.dropped} of {layers}",
            f"{row.perplexity:.1f}",
            "" if full is None else f"{row.perplexity / full.perplexity:.2f}x",
            f"{row.kl:.3f}",
            f"{row.agreement:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
