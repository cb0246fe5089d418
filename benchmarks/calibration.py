"""How much a cosine plan depends on what it was measured on: the source, its size, the seed.

    python -m benchmarks.calibration --judge TEXT.txt --source FILE.txt --source CHAT.jsonl

Every source gives the layers' importance at every size; `self`, which is always one of them, with
every seed. Beside the layers that are chosen differently than by the first row stands what the
choice costs, KL(full || pruned) and top-1 agreement, on a text that chose nothing. `spread` is the
largest difference of any layer's importance from the first row's, over the median importance.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.inprocess import machine
from pruning.calibration import SELF, Progress, calibrate
from pruning.cli import DeviceOption, DtypeOption, ModelOption, progress_bars, user_errors
from pruning.divergence import Quality
from pruning.importance import measure_importance
from pruning.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from pruning.selection import rank_by_importance
from pruning.trial import Trial


@dataclass(frozen=True, slots=True)
class Scores:
    """The importance of every layer by one calibration set."""

    source: str
    samples: int
    seed: int | None
    """None where the source is not written from one."""
    importance: tuple[float, ...]

    def dropped(self, count: int) -> frozenset[int]:
        """Return the layers that a plan of these scores drops."""
        return frozenset(
            step.layer for step in rank_by_importance(self.importance, frozenset())[:count]
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """What a calibration set chooses at one depth."""

    source: str
    samples: int
    seed: int | None
    spread: float
    count: int
    layers: tuple[int, ...]
    others: int
    """Layers that the first calibration set would not have dropped."""
    quality: Quality


def main(
    judge: Annotated[str, typer.Option(help="Text that says what choices cost.")],
    source: Annotated[
        list[str] | None, typer.Option(help="Calibration data beside self. Repeatable.")
    ] = None,
    samples: Annotated[str, typer.Option(help="Samples of each set.")] = "128,32,8",
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    seeds: Annotated[str, typer.Option(help="Of what the model writes.")] = "0,1,2",
    drop: Annotated[str, typer.Option(help="Layers to drop.")] = "4,8,15",
    windows: Annotated[int, typer.Option(help="Samples of the judging text.")] = 16,
    model: ModelOption = EMBEDDED_MODEL,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure calibration sets against each other."""
    sizes, counts = _numbers(samples), _numbers(drop)
    with user_errors(), progress_bars() as progress:
        base = load_base_model(model, dtype=dtype, device=device)
        asked = (*_sets([SELF], sizes, _numbers(seeds)), *_sets(source or [], sizes, [None]))
        scores = [_scored(base, *each, length, progress) for each in asked]
        tokens = calibrate(judge, base, samples=windows, length=length).token_ids
        choices = chosen(scores, counts, Trial(base, tokens))
    _print(choices, counts)
    if output is not None:
        body = {"machine": machine(base.device), "rows": [asdict(each) for each in choices]}
        output.write_text(json.dumps(body, indent=2) + "\n")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _sets(
    sources: Sequence[str], sizes: Sequence[int], seeds: Sequence[int | None]
) -> Iterator[tuple[str, int, int | None]]:
    for source in sources:
        for size in sizes:
            for seed in seeds:
                yield source, size, seed


def _scored(
    base: BaseModel, source: str, samples: int, seed: int | None, length: int, progress: Progress
) -> Scores:
    found = calibrate(
        source, base, samples=samples, length=length, seed=seed or 0, progress=progress
    )
    importance = measure_importance(base, found.token_ids, progress=progress)
    return Scores(Path(source).name, samples, seed, importance)


def chosen(scores: Sequence[Scores], counts: Sequence[int], trial: Trial) -> list[Choice]:
    """Return what every calibration set chooses at every depth, and what that costs."""
    first = scores[0]
    usual = statistics.median(first.importance)
    sets = sorted({each.dropped(n) for each in scores for n in counts}, key=sorted)
    with torch.inference_mode():
        worth = dict(zip(sets, trial.of_each(sets), strict=True))
    rows = []
    for each in scores:
        pairs = zip(each.importance, first.importance, strict=True)
        spread = max(abs(own - other) for own, other in pairs) / usual
        for count in counts:
            layers = each.dropped(count)
            rows.append(
                Choice(
                    each.source,
                    each.samples,
                    each.seed,
                    spread,
                    count,
                    tuple(sorted(layers)),
                    len(layers - first.dropped(count)),
                    worth[layers],
                )
            )
    return rows


def _print(choices: Sequence[Choice], counts: Sequence[int]) -> None:
    table = Table(title="cosine plans: other layers than the first row's / KL / agreement")
    for heading in ("source", "samples", "seed", "spread", *(f"{n} dropped" for n in counts)):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for at in range(0, len(choices), len(counts)):
        row = choices[at : at + len(counts)]
        table.add_row(
            row[0].source,
            str(row[0].samples),
            "" if row[0].seed is None else str(row[0].seed),
            f"{row[0].spread:.2f}",
            *(f"{c.others} / {c.quality.kl:.3f} / {c.quality.agreement:.3f}" for c in row),
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
