"""What a shared beginning saves: time to the first token of a second request over that of a first.

    python -m benchmarks.prefix --shared-tokens 1024 --own-tokens 32 --repeats 5

Starts a server (or uses --url). Every repeat has a new beginning: one request computes it, another
goes on differently after it, the same size and alone on the server too. The bar: 0.2.
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.load import ours, send
from benchmarks.server import running_server
from pruning.loading import EMBEDDED_MODEL

BAR = 0.2
VOCABULARY = 10_000
"""Token ids below this exist in any model."""


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the repeats, in seconds."""

    variant: str
    first: float
    second: float
    cached_tokens: int
    """Of the second request's prompt."""

    @property
    def ratio(self) -> float:
        return self.second / self.first


def main(
    url: Annotated[str | None, typer.Option(help="A running server; else one is started.")] = None,
    model: Annotated[str, typer.Option(help="What to serve.")] = EMBEDDED_MODEL,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "25%",
    variants: Annotated[str, typer.Option(help="Variants to measure.")] = "full,pruned",
    shared_tokens: int = 1024,
    own_tokens: int = 32,
    repeats: int = 5,
    dtype: str = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the time to the first token with and without a shared beginning."""
    options = ["--model", model, "--drop", drop, "--dtype", dtype]
    with running_server(url, options) as address:
        rows = asyncio.run(
            _measure(address, variants.split(","), shared_tokens, own_tokens, repeats)
        )
    _print(rows, shared_tokens, own_tokens)
    if output is not None:
        facts = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        body = {**facts, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


async def _measure(
    url: str, variants: Sequence[str], shared: int, own: int, repeats: int
) -> list[Row]:
    """Alternate the variants, so that a machine that drifts treats them alike. The first round, a
    warm-up, is left out."""
    draw = random.Random()  # new beginnings each time, also on a server that has seen others
    rounds: dict[str, list[tuple[float, float, int]]] = {variant: [] for variant in variants}
    for _ in range(repeats + 1):
        for variant in variants:
            beginning = _tokens(draw, shared)
            prompts = [beginning + _tokens(draw, own) for _ in range(2)]
            first, second = [await send(ours(url, variant), prompt, 4) for prompt in prompts]
            rounds[variant].append((first.first, second.first, second.cached_tokens))
    return [_row(variant, found[1:]) for variant, found in rounds.items()]


def _row(variant: str, rounds: Sequence[tuple[float, float, int]]) -> Row:
    first, second, cached = zip(*rounds, strict=True)
    return Row(variant, statistics.median(first), statistics.median(second), min(cached))


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(10, VOCABULARY) for _ in range(count)]


def _print(rows: Sequence[Row], shared: int, own: int) -> None:
    table = Table(title=f"{shared} shared and {own} own prompt tokens; bar: {BAR}")
    for heading in ("variant", "first TTFT ms", "second TTFT ms", "ratio", "cached tokens"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        table.add_row(
            row.variant,
            f"{row.first * 1e3:.1f}",
            f"{row.second * 1e3:.1f}",
            f"{row.ratio:.3f}" + ("" if row.ratio <= BAR else " !"),
            str(row.cached_tokens),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
