"""What a shared beginning saves: time to the first token of a second request over that of a first.

    python -m benchmarks.prefix --shared-tokens 1024 --own-tokens 32 --repeats 5

Starts a server (or uses --url). Every repeat has a new beginning: one request computes it, another
goes on differently after it, the same size and alone on the server too. The bar: 0.2.

Where the second one's time goes is what /metrics says after it less what it said before::

    client   |-- outside, there --|                                   |-- outside, back --|
    engine                        |-- queue --|-- host --|  device  --|
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.load import metric, ours, send
from benchmarks.server import running_server
from pruning.loading import EMBEDDED_MODEL

BAR = 0.2
VOCABULARY = 10_000
"""Token ids below this exist in any model."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Where the time to a first token goes, in seconds."""

    outside: float
    """Client, HTTP, tokens in and out: what the engine does not see."""
    queue: float
    """In the engine until it is scheduled, its beginning found."""
    host: float
    """From then to the token, less the device's time: layout and launch. On a CPU all of it."""
    device: float
    """By the device's own timestamps."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two requests with one beginning, in seconds."""

    first: float
    second: float
    cached_tokens: int
    stages: Stages


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the repeats, in seconds."""

    variant: str
    first: float
    second: float
    cached_tokens: int
    """Of the second request's prompt."""
    stages: Stages
    """Of the second request."""

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
    rounds: dict[str, list[Pair]] = {variant: [] for variant in variants}
    for _ in range(repeats + 1):
        for variant in variants:
            beginning = _tokens(draw, shared)
            prompts = [beginning + _tokens(draw, own) for _ in range(2)]
            rounds[variant].append(await _pair(url, variant, prompts))
    return [_row(variant, found[1:]) for variant, found in rounds.items()]


async def _pair(url: str, variant: str, prompts: Sequence[list[int]]) -> Pair:
    """Send one request after the other, for one token each, so that the device runs one step."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        first = await send(ours(url, variant), prompts[0], 1)
        before = (await client.get("/metrics")).text
        second = await send(ours(url, variant), prompts[1], 1)
        after = (await client.get("/metrics")).text
    stages = _stages(before, after, variant, second.first)
    return Pair(first.first, second.first, second.cached_tokens, stages)


def _stages(before: str, after: str, variant: str, first_token: float) -> Stages:
    """Return the stages of the one request between two texts of /metrics."""

    def passed(name: str, label: str = f'variant="{variant}"') -> float:
        name = f"attndrop_{name}"
        return metric(after, name, label) - metric(before, name, label)

    queue, prefill = passed("queue_time_seconds_sum"), passed("prefill_time_seconds_sum")
    device = passed("device_busy_seconds_total", "")
    return Stages(first_token - queue - prefill, queue, prefill - device, device)


def _row(variant: str, pairs: Sequence[Pair]) -> Row:
    def median(of: Callable[[Pair], float]) -> float:
        return statistics.median(map(of, pairs))

    return Row(
        variant,
        first=median(lambda pair: pair.first),
        second=median(lambda pair: pair.second),
        cached_tokens=min(pair.cached_tokens for pair in pairs),
        stages=Stages(
            outside=median(lambda pair: pair.stages.outside),
            queue=median(lambda pair: pair.stages.queue),
            host=median(lambda pair: pair.stages.host),
            device=median(lambda pair: pair.stages.device),
        ),
    )


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(10, VOCABULARY) for _ in range(count)]


def _print(rows: Sequence[Row], shared: int, own: int) -> None:
    table = Table(title=f"{shared} shared and {own} own prompt tokens, ms to the first; bar: {BAR}")
    headings = ["variant", "first", "second", "ratio", "cached", *map(_of_second, fields(Stages))]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        table.add_row(
            row.variant,
            f"{row.first * 1e3:.1f}",
            f"{row.second * 1e3:.1f}",
            f"{row.ratio:.3f}" + ("" if row.ratio <= BAR else " !"),
            str(row.cached_tokens),
            *(f"{seconds * 1e3:.2f}" for seconds in asdict(row.stages).values()),
        )
    Console(width=120).print(table)


def _of_second(stage: Field[float]) -> str:
    return f"second: {stage.name}"


if __name__ == "__main__":
    typer.run(main)
