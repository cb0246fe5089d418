"""What dropping attention gives a decode step, and what linear substitutes cost it.

    python -m benchmarks.substitutes --drop 50% --kind linear --batch 1,8 --context 64,2048
    python -m benchmarks.substitutes --shape llama-3-8b --kind linear:256         # on a GPU

The full variant, the pruned one, and the pruned one with substitutes, in turns; ratios are medians
of those within a turn. Speed alone is measured, so the maps are random. On a CPU one engine decodes
in all three ways, since two engines differ by more than what is asked; a GPU records what a step
does, so there every turn makes its engines anew. The model is served as it would be by default: on
a CPU in four bits where the checkpoint allows it, with compiled layers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.inprocess import COMPILED, Running, decode, machine, passing, running, served_base
from benchmarks.shapes import PRUNED, device_and_dtype, dropping, random_base
from benchmarks.step import limits_for
from pruning.loading import EMBEDDED_MODEL, BaseModel
from pruning.plan import parse_drop
from pruning.quantised import four_bit_layers, quantise_substitutes
from pruning.substitutes import (
    LinearSubstitute,
    SubstituteError,
    SubstituteKind,
    Substitutes,
    parse_substitutes,
)
from pruning.variants import FULL, Variants
from server.engine.assembly import EngineConfig

_STEPS = 64

Cell = tuple[int, int]
"""Requests that decode together, and the tokens of each."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of a step."""

    full: float
    plain: float
    substituted: float


Turns = dict[Cell, list[Turn]]
Prepare = Callable[[SubstituteKind | None], tuple[BaseModel, Variants, str]]
"""Loads a model, with substitutes of a kind or none, and says what they take."""


@dataclass(frozen=True, slots=True)
class Row:
    """One batch and context; medians, in seconds a step."""

    batch: int
    context: int
    full: float
    plain: float
    substituted: float
    faster: float
    """The full variant's time over that of the pruned one without substitutes."""
    slower: float
    """The time with substitutes over that without."""

    @classmethod
    def of(cls, cell: Cell, turns: Sequence[Turn]) -> Row:
        return cls(
            *cell,
            full=statistics.median(turn.full for turn in turns),
            plain=statistics.median(turn.plain for turn in turns),
            substituted=statistics.median(turn.substituted for turn in turns),
            faster=statistics.median(turn.full / turn.plain for turn in turns),
            slower=statistics.median(turn.substituted / turn.plain for turn in turns),
        )


def main(
    model: Annotated[str, typer.Option(help="What to decode with.")] = EMBEDDED_MODEL,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead.")] = None,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "50%",
    kind: Annotated[str, typer.Option(help="linear or linear:RANK.")] = "linear",
    batch: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8",
    context: Annotated[str, typer.Option(help="Tokens of each.")] = "64,2048",
    repeats: Annotated[int, typer.Option(min=1, help="Turns.")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure substitutes."""
    try:
        wanted = parse_substitutes(kind)
    except SubstituteError as error:
        raise typer.BadParameter(str(error)) from error
    if wanted is None:
        raise typer.BadParameter("there is nothing to measure without substitutes")
    where, weights = device_and_dtype("auto", "auto")
    load = (lambda: random_base(shape, weights, where)) if shape else (lambda: served_base(model))
    cells = [(int(b), int(c)) for c in context.split(",") for b in batch.split(",")]
    measure = _by_engines if where.type == "cuda" else _by_one_engine
    turns, described = measure(partial(_prepared, load, drop), wanted, cells, repeats)
    rows = [Row.of(cell, turns[cell]) for cell in cells]
    _print(rows, f"{shape or model}, {drop} dropped: {described}")
    if output is not None:
        body = {"machine": machine(where), "kind": kind, "drop": drop, "substitutes": described}
        output.write_text(json.dumps(body | {"rows": [asdict(row) for row in rows]}) + "\n")


def _by_one_engine(
    prepare: Prepare, kind: SubstituteKind, cells: Sequence[Cell], repeats: int
) -> tuple[Turns, str]:
    """Decode in turns on one engine; return the turns, and what the substitutes take."""
    base, variants, described = passing(lambda: prepare(kind))
    turns: Turns = {cell: [] for cell in cells}
    with running(base, variants, _config(base, cells)) as engine:
        for cell in track(cells, description="measuring"):
            _step_seconds(engine, PRUNED, (cell[0], 32))  # meets this batch for the first time
            for _ in range(repeats):
                full = _step_seconds(engine, FULL, cell)
                with _passing_through(base):
                    plain = _step_seconds(engine, PRUNED, cell)
                turns[cell].append(Turn(full, plain, _step_seconds(engine, PRUNED, cell)))
    return turns, described


@contextmanager
def _passing_through(base: BaseModel) -> Iterator[None]:
    """Let rows that do not attend pass through all sublayers, as long as this lasts."""
    former = [sublayer.replace_by(lambda hidden: hidden) for sublayer in base.sublayers]
    try:
        yield
    finally:
        for sublayer, function in zip(base.sublayers, former, strict=True):
            sublayer.replace_by(function)


def _by_engines(
    prepare: Prepare, kind: SubstituteKind, cells: Sequence[Cell], repeats: int
) -> tuple[Turns, str]:
    """Decode on engines without and with substitutes, made for each turn; return the turns, and
    what the substitutes take."""
    turns: Turns = {cell: [] for cell in cells}
    described = ""
    for _ in track(range(repeats), description="measuring"):
        bare, _text = _cells(prepare, None, cells, (FULL, PRUNED))
        mapped, described = _cells(prepare, kind, cells, (PRUNED,))
        for cell in cells:
            turns[cell].append(Turn(*bare[cell], *mapped[cell]))
    return turns, described


def _cells(
    prepare: Prepare, kind: SubstituteKind | None, cells: Sequence[Cell], names: Sequence[str]
) -> tuple[dict[Cell, list[float]], str]:
    """Return the seconds of a step of these variants in each cell, and what substitutes take."""
    base, variants, described = passing(lambda: prepare(kind))
    with running(base, variants, _config(base, cells)) as engine:
        decode(engine, {PRUNED: max(count for count, _ in cells)}, 32, 8)
        found = {cell: [_step_seconds(engine, name, cell) for name in names] for cell in cells}
    return found, described


def _config(base: BaseModel, cells: Sequence[Cell]) -> EngineConfig:
    most = max(count for count, _ in cells)
    return EngineConfig(limits_for(most, base.device, None), compiled=COMPILED)


def _step_seconds(engine: Running, variant: str, cell: Cell) -> float:
    count, tokens = cell
    return decode(engine, {variant: count}, tokens, _STEPS).step_seconds


def _prepared(
    load: Callable[[], BaseModel], drop: str, kind: SubstituteKind | None
) -> tuple[BaseModel, Variants, str]:
    """Load a model, put substitutes in dropped sublayers' places, and say what they take."""
    base = load()
    variants = dropping(base.layers, parse_drop(drop, layers=base.layers, most=base.layers - 1))
    if kind is None:
        return base, variants, ""
    dropped = variants[PRUNED].dropped(base.layers)
    maps = Substitutes({layer: _random_map(base, kind) for layer in dropped})
    maps.attach(base, dropped)
    if four_bit_layers(base.model):
        quantise_substitutes(base)
    return base, variants, maps.described(dropped)


def _random_map(base: BaseModel, kind: SubstituteKind) -> LinearSubstitute:
    width = int(base.model.config.get_text_config().hidden_size)
    bias = torch.zeros(width)
    if kind.rank is None:
        return LinearSubstitute(torch.randn(width, width) / width, bias)
    return LinearSubstitute(
        torch.randn(width, kind.rank) / width, bias, torch.randn(kind.rank, width) / width
    )


def _print(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    headings = ("full, ms", "dropped, ms", "full over it", "with substitutes, ms", "slower by")
    for name in ("batch", "context", *headings):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.batch),
            str(row.context),
            f"{row.full * 1e3:.2f}",
            f"{row.plain * 1e3:.2f}",
            f"{row.faster:.2f}",
            f"{row.substituted * 1e3:.2f}",
            f"{row.slower - 1:.1%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
