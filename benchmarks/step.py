"""Decode steps and prefill of full, pruned and mixed batches, beside the roofline.

    python -m benchmarks.step --shape llama-3-8b --batch 1,8,32,128 --context 2048 --drop 50%

Random weights of a named shape, in this process, no HTTP. Every time stands beside the least time
that the ceilings measured in the same run allow. With --peers, transformers' `generate` and its
continuous batching run the same load of requests afterwards, on the same weights made anew.

A mixed batch is half `full` and half `pruned` in one engine step; it is held against one step of
the full half and one of the pruned half, each by itself, in the same run.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.inprocess import (
    Decoded,
    DoesNotFitError,
    Mix,
    Prefilled,
    Running,
    decode,
    machine,
    prefill,
    running,
    serve,
)
from benchmarks.peers import PeerRun, bounded, continuous_batching, free_memory, static_generate
from benchmarks.roofline import Ceilings, Floor, Rows, floor, measure_ceilings
from benchmarks.shapes import PRUNED, device_and_dtype, dropping, random_base, random_model
from pruning.loading import BaseModel
from pruning.plan import parse_drop
from pruning.variants import FULL, Variants
from server.config import parse_bytes
from server.engine.assembly import EngineConfig, KvCacheDtype, default_limits, kv_dtype
from server.engine.scheduler import Limits

MIXED = "mixed 50:50"
_PREFILL = re.compile(r"(\d+)x(\d+)")
_LOAD = re.compile(r"(\d+)x(\d+)\+(\d+)")
_WARM_UP_CONTEXT, _WARM_UP_STEPS = 32, 8

Run = TypeVar("Run")


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure: a decode step at a context, or a prefill of so many tokens."""

    what: str
    batch: int
    tokens: int

    @property
    def mix(self) -> Mix:
        half = self.batch // 2
        return {FULL: half, PRUNED: half} if self.what == MIXED else {self.what: self.batch}

    def __str__(self) -> str:
        return f"{self.what}, batch {self.batch}, {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that ours and peers serve."""

    requests: int
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is measured."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[tuple[int, int], ...] = ()
    """Prompts and the tokens of each."""
    steps: int = 64
    """Decode steps in a window."""
    repeats: int = 3
    load: Load | None = None

    @property
    def decode_cells(self) -> list[Cell]:
        """The halves that mixed batches are held against included."""
        pairs = [(context, batch) for context in self.contexts for batch in self.batches]
        even = [(context, batch) for context, batch in pairs if batch % 2 == 0]
        alone = sorted({*pairs, *((context, batch // 2) for context, batch in even)})
        cells = [Cell(what, batch, context) for context, batch in alone for what in (FULL, PRUNED)]
        return [*cells, *(Cell(MIXED, batch, context) for context, batch in even)]

    @property
    def prefill_cells(self) -> list[Cell]:
        return [Cell(what, *sizes) for sizes in self.prefills for what in (FULL, PRUNED)]

    @property
    def most_requests(self) -> int:
        """Return how many requests run together at most."""
        load = 0 if self.load is None else self.load.requests
        return max([*self.batches, *(batch for batch, _ in self.prefills), load])


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One decode step, the median of a window of them."""

    what: str
    batch: int
    context: int
    mean_context: float
    """Tokens with keys and values in the middle of the window, mean of the requests."""
    seconds: float
    roofline_seconds: float
    ratio: float
    """Time over the roofline by copy bandwidth."""
    ratio_by_read: float
    """Time over the roofline by read bandwidth."""
    tokens_per_second: float
    idle_share: float | None
    bytes: float
    operations: float
    kv_bytes: int
    first_token_seconds: float
    over_full: float | None
    """Throughput over that of `full` at the same batch."""
    over_separate: float | None
    """Mixed only: throughput over the two halves as steps of their own."""
    roofline_over_separate: float | None
    """Mixed only: the same, of the rooflines."""


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Prompts submitted together, until each has its first token."""

    what: str
    batch: int
    prompt: int
    seconds: float
    roofline_seconds: float
    ratio: float
    tokens_per_second: float
    """Prompt tokens."""
    idle_share: float | None
    over_full: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured, and what was not, with the reason."""

    decode: tuple[DecodeRow, ...]
    prefill: tuple[PrefillRow, ...]
    served: tuple[PeerRun, ...]
    """The load, if there is one, by ours."""
    skipped: tuple[str, ...]
    start_seconds: float
    """What it took to build the engine."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least times of one model on one device."""

    base: BaseModel
    variants: Variants
    ceilings: Ceilings
    kv_element_bytes: int

    def decode(self, cell: Cell, run: Decoded) -> Floor:
        return self._floor(cell, 1, run.contexts)

    def prefill(self, cell: Cell) -> Floor:
        return self._floor(cell, cell.tokens, dict.fromkeys(cell.mix, 0.0))

    def _floor(self, cell: Cell, tokens: int, contexts: Mapping[str, float]) -> Floor:
        work = [
            Rows(count, tokens, contexts[name], len(self.variants[name].kept))
            for name, count in cell.mix.items()
        ]
        config = self.base.model.config
        assert isinstance(config, LlamaConfig)
        return floor(config, self.base.model.dtype.itemsize, work, self.kv_element_bytes)


def main(
    shape: Annotated[str, typer.Option(help="A named shape, such as llama-2-13b.")] = "llama-3-8b",
    batch: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8,32,128",
    context: Annotated[str, typer.Option(help="Tokens of each, mid-window.")] = "2048",
    prefills: Annotated[
        str, typer.Option("--prefill", help="Prompts x tokens, or nothing.")
    ] = "1x2048,32x2048",
    drop: Annotated[str, typer.Option(help="What `pruned` drops: layers or a share.")] = "50%",
    layers: Annotated[int | None, typer.Option(help="Cut the shape to so many layers.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Decode steps in a window.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    max_tokens_per_step: Annotated[
        int | None, typer.Option(help="By default what suits the device.")
    ] = None,
    kv_memory: Annotated[str | None, typer.Option(help="Page pool, such as 40GiB.")] = None,
    kv_cache_dtype: Annotated[KvCacheDtype, typer.Option(help="As of the server.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="Without CUDA graphs.")] = False,
    device: str = "auto",
    dtype: str = "auto",
    peers: Annotated[bool, typer.Option("--peers", help="Run peers on --load, too.")] = False,
    load: Annotated[str, typer.Option(help="Requests x prompt + generated tokens.")] = (
        "64x1024+128"
    ),
    peer_seconds: Annotated[float, typer.Option(min=1, help="A peer's time at most.")] = 300,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure steps."""
    try:
        where, weights = device_and_dtype(device, dtype)
        sweep = Sweep(
            batches=_numbers(batch),
            contexts=_numbers(context),
            prefills=parse_prefills(prefills),
            steps=steps,
            repeats=repeats,
            load=Load(*_parts(_LOAD, load)) if peers else None,
        )
        limits = limits_for(sweep.most_requests, where, max_tokens_per_step)
        config = EngineConfig(
            limits, parse_bytes(kv_memory), enforce_eager=eager, kv_cache_dtype=kv_cache_dtype
        )
        ceilings = measure_ceilings(where, weights)
        base = random_base(shape, weights, where, layers)
        variants = dropping(base.layers, parse_drop(drop, layers=base.layers, most=base.layers - 1))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    report = measure(base, variants, config, sweep, ceilings)
    depth = f"{base.layers} layers, {len(variants[PRUNED].dropped(base.layers))} dropped by pruned"
    del base
    title = (
        f"{shape} ({depth}), random weights, {weights}, KV cache {kv_cache_dtype}, on "
        f"{machine(where)['device']}, at most {limits.tokens_per_step} tokens a step"
    )
    _print(title, report, ceilings)
    others = _peers(Weights(shape, where, weights, layers), sweep.load, peer_seconds)
    if report.served:
        Console(width=160 if not sys.stdout.isatty() else None).print(
            _peer_table(report.served, others)
        )
    if output is not None:
        body = {
            "setting": {"title": title, "drop": drop, "steps": steps, "repeats": repeats}
            | {"kv_memory": kv_memory, "kv_cache_dtype": kv_cache_dtype}
            | {"eager": eager, "load": load if peers else None},
            "machine": machine(where),
            "ceilings": asdict(ceilings),
            "decode": [asdict(row) for row in report.decode],
            "prefill": [asdict(row) for row in report.prefill],
            "peers": [asdict(run) for run in [*report.served, *others]],
            "skipped": report.skipped,
            "start_seconds": report.start_seconds,
        }
        output.write_text(json.dumps(body, indent=2) + "\n")


def limits_for(requests: int, device: torch.device, tokens_per_step: int | None) -> Limits:
    """Return a device's limits, widened so that all requests may run together."""
    usual = default_limits(device, tokens_per_step)
    return replace(usual, running=requests, waiting=max(usual.waiting, requests))


def measure(
    base: BaseModel, variants: Variants, config: EngineConfig, sweep: Sweep, ceilings: Ceilings
) -> Report:
    """Measure a sweep on one engine of the variants `full` and `pruned`."""
    kv_element_bytes = kv_dtype(config.kv_cache_dtype, base.model.dtype).itemsize
    roofline, skipped = Roofline(base, variants, ceilings, kv_element_bytes), list[str]()
    with running(base, variants, config) as engine:
        decoded = _each(sweep.decode_cells, lambda c: _decoded(engine, c, sweep), skipped)
        prefilled = _each(sweep.prefill_cells, lambda c: _prefilled(engine, c, sweep), skipped)
        served = tuple(_served(engine, sweep.load)) if sweep.load else ()
    return Report(
        tuple(_decode_row(roofline, cell, decoded) for cell in decoded),
        tuple(_prefill_row(roofline, cell, prefilled) for cell in prefilled),
        served,
        tuple(skipped),
        engine.start_seconds,
    )


def _each(cells: Sequence[Cell], run: Callable[[Cell], Run], skipped: list[str]) -> dict[Cell, Run]:
    """Run what fits, and add what does not to `skipped`."""
    done: dict[Cell, Run] = {}
    console = Console(stderr=True)
    for cell in cells:
        try:
            done[cell] = run(cell)
            console.print(f"measured {cell}", style="dim")
        except DoesNotFitError as error:
            skipped.append(f"{cell}: {error}")
    return done


def _decoded(engine: Running, cell: Cell, sweep: Sweep) -> Decoded:
    """Return the median run, after a short one that meets this batch for the first time."""
    decode(engine, cell.mix, _WARM_UP_CONTEXT, _WARM_UP_STEPS)
    runs = [decode(engine, cell.mix, cell.tokens, sweep.steps) for _ in range(sweep.repeats)]
    return sorted(runs, key=lambda run: run.step_seconds)[len(runs) // 2]


def _prefilled(engine: Running, cell: Cell, sweep: Sweep) -> Prefilled:
    """Return the median run; the first, a warm-up, has been left out."""
    runs = [prefill(engine, cell.mix, cell.tokens) for _ in range(sweep.repeats + 1)]
    return sorted(runs[1:], key=lambda run: run.seconds)[sweep.repeats // 2]


def _served(engine: Running, load: Load) -> list[PeerRun]:
    """Serve the load by each variant, twice: the first time is a warm-up."""
    runs = []
    for variant in (FULL, PRUNED):
        for _ in range(2):
            run = serve(engine, variant, load.requests, load.prompt, load.output, load.requests)
        runs.append(PeerRun(f"attndrop {variant}", run.tokens_per_second, run.step_seconds))
    return runs


@dataclass(frozen=True, slots=True)
class Weights:
    """A model of random weights, as a peer's own process makes it."""

    shape: str
    device: torch.device
    dtype: torch.dtype
    layers: int | None

    def model(self) -> PreTrainedModel:
        return random_model(self.shape, self.dtype, self.device, self.layers)


def _peers(weights: Weights, load: Load | None, seconds: float) -> list[PeerRun]:
    """Run the peers on unwrapped models of the same weights, after ours has left the device."""
    free_memory()
    if load is None:
        return []
    return [
        bounded("transformers generate", seconds, _generate, weights, load),
        bounded("transformers continuous batching", seconds, _continuous, weights, load),
    ]


def _generate(weights: Weights, load: Load) -> PeerRun:
    model = weights.model()
    return static_generate(model, _prompts(load, model.config.vocab_size), load.output)


def _continuous(weights: Weights, load: Load) -> PeerRun:
    model = weights.model()
    warm_up, prompts = (_prompts(load, model.config.vocab_size) for _ in range(2))
    return continuous_batching(model, warm_up, prompts, load.output)


def _prompts(load: Load, vocabulary: int) -> list[list[int]]:
    return [random.choices(range(vocabulary), k=load.prompt) for _ in range(load.requests)]


def _decode_row(roofline: Roofline, cell: Cell, runs: Mapping[Cell, Decoded]) -> DecodeRow:
    run, ceilings = runs[cell], roofline.ceilings
    least = roofline.decode(cell, run)
    seconds = least.seconds(ceilings)
    full = runs.get(Cell(FULL, cell.batch, cell.tokens))
    halves = {half: runs[half] for half in _halves(cell) if half in runs}
    separate = len(halves) == 2
    apart = sum(half.step_seconds for half in halves.values())
    least_apart = sum(roofline.decode(*half).seconds(ceilings) for half in halves.items())
    return DecodeRow(
        what=cell.what,
        batch=cell.batch,
        context=cell.tokens,
        mean_context=statistics.mean(run.contexts.values()),
        seconds=run.step_seconds,
        roofline_seconds=seconds,
        ratio=run.step_seconds / seconds,
        ratio_by_read=run.step_seconds / least.seconds_by_read(ceilings),
        tokens_per_second=cell.batch / run.step_seconds,
        idle_share=run.idle_share,
        bytes=least.bytes,
        operations=least.operations,
        kv_bytes=run.kv_bytes,
        first_token_seconds=run.first_token_seconds,
        over_full=None if full is None else full.step_seconds / run.step_seconds,
        over_separate=apart / run.step_seconds if separate else None,
        roofline_over_separate=least_apart / seconds if separate else None,
    )


def _halves(cell: Cell) -> list[Cell]:
    """Return what a mixed batch would be as steps of one variant each."""
    if cell.what != MIXED:
        return []
    return [Cell(what, cell.batch // 2, cell.tokens) for what in (FULL, PRUNED)]


def _prefill_row(roofline: Roofline, cell: Cell, runs: Mapping[Cell, Prefilled]) -> PrefillRow:
    run = runs[cell]
    least = roofline.prefill(cell).seconds(roofline.ceilings)
    full = runs.get(Cell(FULL, cell.batch, cell.tokens))
    return PrefillRow(
        what=cell.what,
        batch=cell.batch,
        prompt=cell.tokens,
        seconds=run.seconds,
        roofline_seconds=least,
        ratio=run.seconds / least,
        tokens_per_second=cell.batch * cell.tokens / run.seconds,
        idle_share=run.idle_share,
        over_full=None if full is None else full.seconds / run.seconds,
    )


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise ValueError(f"{text!r} must be numbers of at least 1, separated by commas")
    return numbers


def parse_prefills(text: str) -> tuple[tuple[int, int], ...]:
    """Return the prompts and the tokens of each that a text like 1x2048,32x2048 names.

    Raises:
        ValueError: it is something else.
    """
    pairs = [_parts(_PREFILL, part) for part in text.split(",") if part]
    return tuple((prompts, tokens) for prompts, tokens in pairs)


def _parts(pattern: re.Pattern[str], text: str) -> tuple[int, ...]:
    """Return the numbers of `32x2048` or `64x1024+128`."""
    match = pattern.fullmatch(text.strip())
    if match is None or min(numbers := tuple(map(int, match.groups()))) < 1:
        raise ValueError(f"{text!r} must be positive numbers written like 32x2048 or 64x1024+128")
    return numbers


def _print(title: str, report: Report, ceilings: Ceilings) -> None:
    console = Console(width=160 if not sys.stdout.isatty() else None)
    console.print(title)
    console.print(describe(ceilings))
    console.print(f"engine built in {report.start_seconds:.1f} s")
    console.print(_decode_table(report.decode))
    if report.prefill:
        console.print(_prefill_table(report.prefill))
    for reason in report.skipped:
        console.print(f"skipped: {reason}")


def describe(ceilings: Ceilings) -> str:
    """Return the ceilings in one line."""
    return (
        f"ceilings of this run: copy {ceilings.copy_bytes_per_second / 1e12:.3f} TB/s, read "
        f"{ceilings.read_bytes_per_second / 1e12:.3f} TB/s, matrix product "
        f"{ceilings.operations_per_second / 1e12:.1f} TFLOP/s"
    )


def _decode_table(rows: Sequence[DecodeRow]) -> Table:
    headings = ("what", "batch", "context", "step ms", "roofline ms", "ratio", "by read")
    table = _table("decode", *headings, "tokens/s", "idle %", "GB a step", "KV GB", "over full")
    table.add_column("over separate (roofline)", justify="right")
    for row in sorted(rows, key=lambda row: (row.context, row.batch, row.what)):
        table.add_row(
            row.what,
            str(row.batch),
            f"{row.mean_context:.0f}",
            f"{row.seconds * 1e3:.3f}",
            f"{row.roofline_seconds * 1e3:.3f}",
            f"{row.ratio:.2f}x",
            f"{row.ratio_by_read:.2f}x",
            f"{row.tokens_per_second:,.0f}",
            percent(row.idle_share),
            f"{row.bytes / 1e9:.3f}",
            f"{row.kv_bytes / 1e9:.3f}",
            times(row.over_full),
            ""
            if row.over_separate is None
            else f"{times(row.over_separate)} ({times(row.roofline_over_separate)})",
        )
    return table


def _prefill_table(rows: Sequence[PrefillRow]) -> Table:
    headings = ("what", "prompts", "tokens each", "ms", "roofline ms", "ratio")
    table = _table("prefill", *headings, "prompt tokens/s", "idle %", "over full")
    for row in rows:
        table.add_row(
            row.what,
            str(row.batch),
            str(row.prompt),
            f"{row.seconds * 1e3:.1f}",
            f"{row.roofline_seconds * 1e3:.1f}",
            f"{row.ratio:.2f}x",
            f"{row.tokens_per_second:,.0f}",
            percent(row.idle_share),
            times(row.over_full),
        )
    return table


def _peer_table(ours: Sequence[PeerRun], peers: Sequence[PeerRun]) -> Table:
    over = [f"{run.who} over it" for run in ours]
    table = _table("the same load", "who", "output tokens/s", "step ms", *over)
    for run in [*ours, *peers]:
        if run.tokens_per_second is None or run.step_seconds is None:
            table.add_row(run.who, f"did not run: {run.error}")
            continue
        rate, step = run.tokens_per_second, run.step_seconds
        ratios = [(mine.tokens_per_second or 0.0) / rate for mine in ours]
        table.add_row(run.who, f"{rate:,.0f}", f"{step * 1e3:.2f}", *map(times, ratios))
    return table


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def percent(share: float | None) -> str:
    """Return a share as a table cell; a dash where it is not measured."""
    return "-" if share is None else f"{share * 100:.1f}"


def times(ratio: float | None) -> str:
    """Return a ratio as a table cell; nothing where there is none."""
    return "" if ratio is None else f"{ratio:.2f}x"


if __name__ == "__main__":
    typer.run(main)
