"""Serving full and pruned side by side over HTTP, beside plain transformers on the same work.

    python -m benchmarks.serve --concurrency 1,4,8 --repeats 3

Starts a server (or uses --url), alternates the variants run by run so that a machine that drifts
treats them alike, and prints medians over the repeats. The peer, `generate` on static batches,
runs afterwards in this process, when the server no longer competes for the cores.
"""

from __future__ import annotations

import asyncio
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.load import Load, Measured, run_load
from benchmarks.peers import plain_model, transformers_generate
from benchmarks.server import running_server
from pruning.loading import EMBEDDED_MODEL, load_base_model

PEER = "transformers generate"


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the repeats of one load."""

    who: str
    concurrency: int
    first_token_p50: float
    first_token_p99: float
    inter_token_p50: float
    inter_token_p99: float
    tokens_per_second: float
    kv_bytes: float
    kv_bytes_per_token: float | None


def main(
    url: Annotated[str | None, typer.Option(help="A running server; else one is started.")] = None,
    model: Annotated[str, typer.Option(help="What to serve.")] = EMBEDDED_MODEL,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "50%",
    variants: Annotated[str, typer.Option(help="Variants to compare.")] = "full,pruned",
    concurrency: Annotated[str, typer.Option(help="Requests in flight.")] = "1,4,8",
    requests: Annotated[int, typer.Option(help="Requests a run, for each one in flight.")] = 2,
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals a second.")] = None,
    repeats: int = 3,
    dtype: str = "auto",
    peer: Annotated[bool, typer.Option(help="Measure plain transformers too.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure serving."""
    loads = [
        Load(requests * at_once, at_once, prompt_tokens, output_tokens, 10_000, rate)
        for at_once in map(int, concurrency.split(","))
    ]
    # Each run sends the prompts of the run before, which the peer would compute again.
    options = ["--model", model, "--drop", drop, "--dtype", dtype, "--no-prefix-caching"]
    with running_server(url, options) as address:
        rows = _served(address, variants.split(","), loads, repeats)
    if peer:
        rows += _peer(model, dtype, loads, repeats)
    _print(rows, loads[0])
    if output is not None:
        facts = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        body = {**facts, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


def _served(url: str, variants: Sequence[str], loads: Sequence[Load], repeats: int) -> list[Row]:
    models = httpx.get(f"{url}/v1/models").json()["data"]
    bytes_per_token = {m["variant"]["name"]: m["variant"]["kv_bytes_per_token"] for m in models}
    rows = []
    for load in loads:
        runs: dict[str, list[Measured]] = {variant: [] for variant in variants}
        for _ in range(repeats + 1):
            for variant in variants:
                runs[variant].append(asyncio.run(run_load(url, variant, load)))
        rows += [_row(v, load, runs[v][1:], bytes_per_token[v]) for v in variants]
    return rows


def _peer(model: str, dtype: str, loads: Sequence[Load], repeats: int) -> list[Row]:
    base = load_base_model(model, dtype=dtype)
    plain = plain_model(base)
    rows = []
    for load in loads:
        runs = [transformers_generate(base, plain, load) for _ in range(repeats + 1)]
        rows.append(_row(PEER, load, runs[1:], None))
    return rows


def _row(who: str, load: Load, runs: Sequence[Measured], bytes_per_token: float | None) -> Row:
    """Return medians; the first run, a warm-up, has been left out."""

    def median(figure: Callable[[Measured], float]) -> float:
        return statistics.median(figure(run) for run in runs)

    return Row(
        who=who,
        concurrency=load.concurrency,
        first_token_p50=median(lambda run: run.first_token(0.5)),
        first_token_p99=median(lambda run: run.first_token(0.99)),
        inter_token_p50=median(lambda run: run.inter_token(0.5)),
        inter_token_p99=median(lambda run: run.inter_token(0.99)),
        tokens_per_second=median(lambda run: run.tokens_per_second),
        kv_bytes=median(lambda run: run.peak_kv_bytes),
        kv_bytes_per_token=bytes_per_token,
    )


def _print(rows: Sequence[Row], load: Load) -> None:
    title = f"{load.prompt_tokens} prompt and {load.output_tokens} generated tokens a request"
    table = Table(title=title)
    for heading in ("in flight", "who", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "who" else "right")
    for heading in ("of full", "of peer", "peak KV MiB", "KV bytes/token"):
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: row.concurrency):
        beside = {r.who: r.tokens_per_second for r in rows if r.concurrency == row.concurrency}
        table.add_row(
            str(row.concurrency),
            row.who,
            *_latencies(row, streams=row.who != PEER or row.concurrency == 1),
            f"{row.tokens_per_second:.1f}",
            _ratio(row.tokens_per_second, beside.get("full")),
            _ratio(row.tokens_per_second, beside.get(PEER)),
            f"{row.kv_bytes / 2**20:.1f}",
            "" if row.kv_bytes_per_token is None else f"{row.kv_bytes_per_token:,.0f}",
        )
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def _latencies(row: Row, *, streams: bool) -> list[str]:
    """A static batch streams nothing: its first token comes with its last."""
    if not streams:
        return [f"{row.first_token_p50 * 1e3:.0f}", f"{row.first_token_p99 * 1e3:.0f}", "-", "-"]
    seconds = (row.first_token_p50, row.first_token_p99, row.inter_token_p50, row.inter_token_p99)
    return [f"{value * 1e3:.1f}" for value in seconds]


def _ratio(value: float, of: float | None) -> str:
    return "" if of is None else f"{value / of:.2f}x"


if __name__ == "__main__":
    typer.run(main)
