"""What dropping attention gives a decode step, and what linear substitutes cost it.

    python -m benchmarks.substitutes --drop 50% --kind linear --batch 1,8 --context 64,2048
    python -m benchmarks.substitutes --shape llama-3-8b --kind linear:256         # on a GPU

The full variant, the pruned one, and the pruned one with substitutes. Speed alone is measured, so
the maps are random. Engines with and without them are built in turns on models made anew, since a
GPU records what a step does; ratios are of the medians. The model is
served as it would be by default: on a CPU in four bits where the checkpoint allows it, with
compiled layers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.inprocess import COMPILED, decode, machine, passing, running
from benchmarks.shapes import PRUNED, device_and_dtype, dropping, random_base
from benchmarks.step import limits_for
from pruning.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from pruning.plan import parse_drop
from pruning.quantised import four_bit_layers, is_on_grid, quantise, quantise_substitutes, runs_here
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
_MEASURED = ("full", "plain", "substituted")

Cell = tuple[int, int]
"""Requests that decode together, and the tokens of each."""


@dataclass(frozen=True, slots=True)
class Row:
    """One batch and context; medians, in seconds a step."""

    batch: int
    context: int
    full: float
    plain: float
    substituted: float

    @property
    def faster(self) -> float:
        """Return the full variant's time over that of the pruned one without substitutes."""
        return self.full / self.plain

    @property
    def slower(self) -> float:
        """Return the time with substitutes over that without."""
        return self.substituted / self.plain


def main(
    model: Annotated[str, typer.Option(help="What to decode with.")] = EMBEDDED_MODEL,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead.")] = None,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "50%",
    kind: Annotated[str, typer.Option(help="linear or linear:RANK.")] = "linear",
    batch: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8",
    context: Annotated[str, typer.Option(help="Tokens of each.")] = "64,2048",
    repeats: int = 3,
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
    load = (lambda: random_base(shape, weights, where)) if shape else (lambda: _served(model))
    cells = [(int(b), int(c)) for c in context.split(",") for b in batch.split(",")]
    times: dict[Cell, dict[str, list[float]]] = {cell: {} for cell in cells}
    described = ""
    for turn in track(range(2 * repeats), description="measuring"):
        found, text = _turn(load, drop, wanted if turn % 2 else None, cells)
        described = text or described
        for cell, seconds in found.items():
            for what, value in seconds.items():
                times[cell].setdefault(what, []).append(value)
    rows = [
        Row(*cell, *(statistics.median(times[cell][what]) for what in _MEASURED)) for cell in cells
    ]
    _print(rows, f"{shape or model}, {drop} dropped: {described}")
    if output is not None:
        body = {"machine": machine(where), "kind": kind, "drop": drop, "substitutes": described}
        output.write_text(json.dumps(body | {"rows": [asdict(row) for row in rows]}) + "\n")


def _served(model: str) -> BaseModel:
    """Load a model as the server does by default."""
    base = load_base_model(model)
    if runs_here(base.device) and is_on_grid(base.model):
        quantise(base.model)
    return base


def _turn(
    load: Callable[[], BaseModel], drop: str, kind: SubstituteKind | None, cells: list[Cell]
) -> tuple[dict[Cell, dict[str, float]], str]:
    """Return the seconds of a step in each cell, by what is measured, and what the substitutes
    take."""
    base, variants, described = passing(lambda: _prepared(load, drop, kind))
    most = max(count for count, _ in cells)
    limits = limits_for(most, base.device, None)
    config = EngineConfig(limits, compiled=COMPILED)
    with running(base, variants, config) as engine:
        measured = {"full": FULL, "plain": PRUNED} if kind is None else {"substituted": PRUNED}
        decode(engine, {PRUNED: most}, 32, 8)
        found = {
            (count, tokens): {
                what: decode(engine, {variant: count}, tokens, _STEPS).step_seconds
                for what, variant in measured.items()
            }
            for count, tokens in cells
        }
    return found, described


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
