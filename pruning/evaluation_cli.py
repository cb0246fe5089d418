"""`attndrop evaluate`: what depths of a plan are worth, as a table and as JSON.

The table goes to stdout, progress and errors to stderr. Knows the options; evaluate.py measures.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pruning.calibration import SELF
from pruning.cli import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    plan_cache,
    progress_bars,
    user_errors,
)
from pruning.evaluate import Amount, Evaluation, evaluate
from pruning.files import write_atomically
from pruning.loading import EMBEDDED_MODEL, load_base_model
from pruning.plan import Plan, PlanError, parse_drop, read_with_substitutes
from pruning.plan_cache import PlanRequest
from pruning.substitutes import Substitutes

DEFAULT = Amount()


def evaluate_command(
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan file; without one, the cached or computed cosine plan."),
    ] = None,
    model: ModelOption = EMBEDDED_MODEL,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Layers to drop: 8, or 25%. Repeatable; default: the plan's own number."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on: a file, self, or hf:NAME. Repeatable."),
    ] = None,
    conversation: Annotated[
        list[str] | None,
        typer.Option(
            help="A JSON-lines file of chat prompts (messages, prompt or turns), which the full "
            "model answers. Repeatable."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = DEFAULT.windows,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = DEFAULT.length,
    prompts: Annotated[int, typer.Option(min=1, help="Conversations.")] = DEFAULT.prompts,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = DEFAULT.answer,
    seed: Annotated[int, typer.Option(min=0, help="Of the answers.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the results here too.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Measure what dropping costs, beside the full model, on text and on conversation."""
    with user_errors():
        if not (text or conversation):
            raise PlanError("name something to measure on: --text FILE or --conversation FILE")
        base = load_base_model(model, dtype=dtype, device=device)
        amount = Amount(windows, length, prompts, answer, seed)
        with progress_bars() as progress:
            if plan is None:
                found, _ = plan_cache().load_or_compute(base, PlanRequest((SELF,)), progress)
                substitutes = plan_cache().substitutes(found)
            else:
                found, substitutes = read_with_substitutes(plan)
                found.check_fits(base)
            depths = _depths(found, drop)
            result = evaluate(
                base, found, substitutes, depths, text or (), conversation or (), amount, progress
            )
        if output is not None:
            _write(output, result)
    _print(result, found, substitutes)


def _depths(plan: Plan, drops: list[str] | None) -> list[int]:
    most = len(plan.ranking)
    return [
        parse_drop(drop, layers=plan.model.layers, most=most) for drop in drops or [str(plan.drop)]
    ]


def _write(path: Path, result: Evaluation) -> None:
    try:
        write_atomically(path, (json.dumps(asdict(result), indent=2) + "\n").encode())
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}; choose another place") from error


def _print(result: Evaluation, plan: Plan, substitutes: Substitutes | None) -> None:
    console = Console()
    console.print(
        f"plan {result.plan} ({result.strategy}) of {result.model}, {result.dtype} on "
        f"{result.device}",
        highlight=False,
    )
    for domain in result.domains:
        table = Table(
            title=f"{domain.name}: {domain.tokens:,} predicted tokens of {domain.source[:40]}",
            box=None,
            title_justify="left",
        )
        for heading in ("dropped", "ppl", "of full", "KL ± error", "p90", "p99", "agree", "p10"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in result.figures:
            if row.domain == domain.name:
                table.add_row(
                    f"{row.dropped} of {plan.model.layers}",
                    f"{row.perplexity:.2f}",
                    f"{row.perplexity_ratio:.3f}x",
                    f"{row.kl:.3f} ± {row.kl_error:.3f}",
                    f"{row.kl_p90:.2f}",
                    f"{row.kl_p99:.2f}",
                    f"{row.agreement:.3f}",
                    f"{row.agreement_p10:.3f}",
                )
        console.print(table)
    _print_health(console, result)
    if substitutes is not None:
        for depth in sorted({row.dropped for row in result.figures} - {0}):
            console.print(f"{depth} dropped: {substitutes.described(plan.dropped_layers(depth))}")


def _print_health(console: Console, result: Evaluation) -> None:
    if not result.health:
        return
    table = Table(title="answers that each wrote itself", box=None, title_justify="left")
    for heading in ("dropped", "answers", "mean tokens", "repetition", "ended by themselves"):
        table.add_column(heading, justify="right")
    for row in result.health:
        table.add_row(
            str(row.dropped),
            str(row.answers),
            f"{row.mean_length:.1f}",
            f"{row.repetition:.3f}",
            f"{row.finished:.0%}",
        )
    console.print(table)
