"""Serving full and pruned side by side over HTTP, beside other servers on the same work.

    python -m benchmarks.serve --concurrency 1,4,8 --repeats 3
    python -m benchmarks.serve --peers llama.cpp,vllm,transformers-serve,generate

Starts a server (or uses --url) and the peers that are installed, and alternates all of them run by
run, so that a machine that drifts treats them alike. Where memory does not hold them together,
--in-turns measures each peer between two turns of ours. `generate` on static batches runs
afterwards in this process, when no server competes for the cores.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.http_peers import PEERS, MissingPeerError, PeerDiedError, Work, started, words_of
from benchmarks.inprocess import machine
from benchmarks.load import Endpoint, Load, Measured, ours, sent
from benchmarks.peers import plain_model, transformers_generate
from benchmarks.server import running_server
from pruning.loading import EMBEDDED_MODEL, load_base_model

GENERATE = "generate"
"""The peer without a server."""
STATIC = "transformers generate"

Contender = tuple[str, Endpoint]
Runs = dict[tuple[str, Load], list[Measured]]


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the repeats of one load."""

    who: str
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    first_token_p50: float
    first_token_p99: float
    inter_token_p50: float
    inter_token_p99: float
    tokens_per_second: float
    prefill_tokens_per_second: float
    """Prompt tokens over the median time to the first token; of one request alone it is the speed
    of prefill."""
    kv_bytes: float | None
    """The most that was seen in use; of llama.cpp, all that it set aside."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is served, and beside whom."""

    url: str | None
    options: tuple[str, ...]
    variants: tuple[str, ...]
    peers: tuple[str, ...]
    work: Work


def main(
    url: Annotated[str | None, typer.Option(help="A running server; else one is started.")] = None,
    model: Annotated[str, typer.Option(help="What to serve.")] = EMBEDDED_MODEL,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "50%",
    variants: Annotated[str, typer.Option(help="Variants to compare.")] = "full,pruned",
    concurrency: Annotated[str, typer.Option(help="Requests in flight.")] = "1,4,8",
    requests: Annotated[int, typer.Option(help="Requests a run, for each one in flight.")] = 2,
    prompt_tokens: int = 128,
    output_tokens: Annotated[int, typer.Option(min=2)] = 64,
    prefill: Annotated[
        int, typer.Option(help="Also one prompt of so many tokens and one token of answer; 0: not.")
    ] = 1024,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals a second.")] = None,
    repeats: int = 3,
    dtype: str = "auto",
    peers: Annotated[str, typer.Option(help=f"Of {', '.join([*PEERS, GENERATE])}.")] = GENERATE,
    in_turns: Annotated[bool, typer.Option(help="Never two servers at once.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure serving."""
    named = tuple(filter(None, peers.split(",")))
    if unknown := set(named) - {*PEERS, GENERATE}:
        known = ", ".join([*PEERS, GENERATE])
        raise typer.BadParameter(f"no peer {', '.join(unknown)}; there are {known}")
    # One peer takes texts alone; whoever else is there gets the same prompts.
    vocabulary = tuple(words_of(model) if "transformers-serve" in named else range(10, 10_000))
    loads = [
        Load(requests * at_once, at_once, prompt_tokens, output_tokens, vocabulary, rate)
        for at_once in map(int, concurrency.split(","))
    ]
    if prefill:
        loads.append(Load(1, 1, prefill, 1, vocabulary))
    # Each run sends the prompts of the run before, which the peers compute again.
    options = ("--model", model, "--drop", drop, "--dtype", dtype, "--no-prefix-caching")
    servers = tuple(name for name in named if name != GENERATE)
    work = Work(model, max(load.concurrency for load in loads), max(load.tokens for load in loads))
    setting = Setting(url, options, tuple(variants.split(",")), servers, work)
    rows = _rows(loads, (_in_turns if in_turns else _together)(setting, loads, repeats))
    if GENERATE in named:
        rows += _static(model, dtype, loads, repeats)
    _print(rows, loads[0], setting.variants)
    if output is not None:
        body = {"machine": machine(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


def _together(setting: Setting, loads: Sequence[Load], repeats: int) -> Runs:
    """Measure with all servers up, one run of each after the other."""
    with ExitStack() as stack:
        contenders = stack.enter_context(_ours(setting))
        for kind in setting.peers:
            contenders = [*contenders, *stack.enter_context(_peer(kind, setting.work))]
        return _measure(contenders, loads, repeats)


def _in_turns(setting: Setting, loads: Sequence[Load], repeats: int) -> Runs:
    """Measure ours, a peer, ours, the next peer, ..., ours: one server up at a time."""
    turns = [_ours(setting)]
    for kind in setting.peers:
        turns += [_peer(kind, setting.work), _ours(setting)]
    runs: Runs = {}
    for turn in turns:
        with turn as contenders:
            for key, found in _measure(contenders, loads, repeats).items():
                runs.setdefault(key, []).extend(found)
    return runs


@contextmanager
def _ours(setting: Setting) -> Iterator[list[Contender]]:
    with running_server(setting.url, setting.options) as url:
        yield [(variant, ours(url, variant)) for variant in setting.variants]


@contextmanager
def _peer(kind: str, work: Work) -> Iterator[list[Contender]]:
    """Yield a peer, or nobody where it cannot run here, and say why."""
    with ExitStack() as stack:
        try:
            found = [stack.enter_context(started(kind, work))]
        except (MissingPeerError, PeerDiedError) as error:
            typer.echo(f"{kind} is left out: {error}", err=True)
            found = []
        yield found


def _measure(contenders: Sequence[Contender], loads: Sequence[Load], repeats: int) -> Runs:
    """Run every load on every contender; the first run, a warm-up, is left out."""
    runs: Runs = {(who, load): [] for load in loads for who, _ in contenders}
    for load in loads:
        for turn in range(repeats + 1):
            for who, endpoint in contenders:
                measured = sent(endpoint, load)
                if turn:
                    runs[who, load].append(measured)
    return runs


def _rows(loads: Sequence[Load], runs: Runs) -> list[Row]:
    return [_row(who, load, runs[who, load]) for load in loads for who in _names(runs)]


def _names(runs: Runs) -> list[str]:
    return list(dict.fromkeys(who for who, _ in runs))


def _static(model: str, dtype: str, loads: Sequence[Load], repeats: int) -> list[Row]:
    base = load_base_model(model, dtype=dtype)
    plain = plain_model(base)
    rows = []
    for load in loads:
        runs = [transformers_generate(base, plain, load) for _ in range(repeats + 1)]
        rows.append(_row(STATIC, load, runs[1:]))
    return rows


def _row(who: str, load: Load, runs: Sequence[Measured]) -> Row:
    def median(figure: Callable[[Measured], float]) -> float:
        return statistics.median(figure(run) for run in runs)

    first = median(lambda run: run.first_token(0.5))
    seen = [run.peak_kv_bytes for run in runs if run.peak_kv_bytes is not None]
    return Row(
        who=who,
        concurrency=load.concurrency,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        first_token_p50=first,
        first_token_p99=median(lambda run: run.first_token(0.99)),
        inter_token_p50=median(lambda run: run.inter_token(0.5)),
        inter_token_p99=median(lambda run: run.inter_token(0.99)),
        tokens_per_second=median(lambda run: run.tokens_per_second),
        prefill_tokens_per_second=load.prompt_tokens / first,
        kv_bytes=statistics.median(seen) if seen else None,
    )


def _print(rows: Sequence[Row], load: Load, variants: Sequence[str]) -> None:
    console = Console(width=160 if not sys.stdout.isatty() else None)
    decoding = [row for row in rows if row.output_tokens == load.output_tokens]
    filling = [row for row in rows if row not in decoding]
    title = f"{load.prompt_tokens} prompt and {load.output_tokens} generated tokens a request"
    console.print(serving_table(title, decoding, variants))
    if filling:
        title = f"one prompt of {filling[0].prompt_tokens} tokens"
        console.print(prefill_table(title, filling, variants))


def serving_table(title: str, rows: Sequence[Row], variants: Sequence[str]) -> Table:
    """Return rows by requests in flight; what ours make of each other's and of peers' speed."""
    table = Table(title=title)
    for heading in ("in flight", "who", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "who" else "right")
    for heading in (*(f"{variant} over it" for variant in variants), "peak KV MiB"):
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: row.concurrency):
        beside = {r.who: r.tokens_per_second for r in rows if r.concurrency == row.concurrency}
        table.add_row(
            str(row.concurrency),
            row.who,
            *_latencies(row, streams=row.who != STATIC or row.concurrency == 1),
            f"{row.tokens_per_second:.1f}",
            *_ratios(beside, row.tokens_per_second, variants),
            "" if row.kv_bytes is None else f"{row.kv_bytes / 2**20:.1f}",
        )
    return table


def prefill_table(title: str, rows: Sequence[Row], variants: Sequence[str]) -> Table:
    """Return how fast one prompt is computed."""
    table = Table(title=title)
    for heading in ("who", "TTFT ms", "prompt tokens/s", *(f"{v} over it" for v in variants)):
        table.add_column(heading, justify="left" if heading == "who" else "right")
    beside = {row.who: row.prefill_tokens_per_second for row in rows}
    for row in rows:
        table.add_row(
            row.who,
            f"{row.first_token_p50 * 1e3:.1f}",
            f"{row.prefill_tokens_per_second:.0f}",
            *_ratios(beside, row.prefill_tokens_per_second, variants),
        )
    return table


def _ratios(beside: dict[str, float], speed: float, variants: Sequence[str]) -> list[str]:
    return [f"{beside[variant] / speed:.2f}" for variant in variants]


def _latencies(row: Row, *, streams: bool) -> list[str]:
    """A static batch streams nothing: its first token comes with its last."""
    if not streams:
        return [f"{row.first_token_p50 * 1e3:.0f}", f"{row.first_token_p99 * 1e3:.0f}", "-", "-"]
    seconds = (row.first_token_p50, row.first_token_p99, row.inter_token_p50, row.inter_token_p99)
    return [f"{value * 1e3:.1f}" for value in seconds]


if __name__ == "__main__":
    typer.run(main)
