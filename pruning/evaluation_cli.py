"""`attndrop evaluate`: what depths of a plan are worth, as a table and as JSON.

The table goes to stdout, progress and errors to stderr. Knows the options; evaluate.py measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pruning.calibration import SELF
from pruning.cli import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    plan_cache,
    progress_bars,
    user_errors,
)
from pruning.evaluate import Evaluator
from pruning.evidence import Amount, Evaluation, EvidenceError, write_evidence
from pruning.evidence_tables import tables
from pruning.loading import EMBEDDED_MODEL, load_base_model
from pruning.plan import Plan, parse_drop, read_with_substitutes
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
    multiple_choice: Annotated[
        list[Path] | None,
        typer.Option(
            help="A JSON-lines file of questions (prompt, choices, gold; or prompts, continuation, "
            "gold). Repeatable."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task of lm-evaluation-harness by its name, or a file of questions to be scored "
            "by it. Repeatable."
        ),
    ] = None,
    ifeval: Annotated[
        list[Path] | None,
        typer.Option(help="A JSON-lines file of prompts with IFEval's instructions. Repeatable."),
    ] = None,
    instructions: Annotated[
        int, typer.Option(min=1, help="Of these prompts at most, at an even stride.")
    ] = DEFAULT.instructions,
    instructed_answer: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer to them at most.")
    ] = DEFAULT.instructed_answer,
    needle: Annotated[
        str, typer.Option(help="Tokens of texts to hide a sentence in, like 512,1024,2048.")
    ] = "",
    needle_depths: Annotated[
        str, typer.Option(help="Where in the text, in percent.")
    ] = "0,25,50,75,100",
    needles: Annotated[
        int, typer.Option(min=1, help="Sentences for each length and place.")
    ] = DEFAULT.needles,
    items: Annotated[
        int, typer.Option(min=1, help="Questions of each file or task at most, at an even stride.")
    ] = DEFAULT.items,
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
    """Measure what dropping costs, beside the full model."""
    with user_errors():
        if not (text or conversation or multiple_choice or task or ifeval or needle):
            raise EvidenceError(
                "name something to measure on: --text FILE, --conversation FILE, "
                "--multiple-choice FILE, --task NAME, --ifeval FILE or --needle LENGTHS"
            )
        base = load_base_model(model, dtype=dtype, device=device)
        amount = Amount(
            windows=windows,
            length=length,
            prompts=prompts,
            answer=answer,
            seed=seed,
            items=items,
            instructions=instructions,
            instructed_answer=instructed_answer,
            needles=needles,
        )
        lengths = _numbers("--needle", needle, 1, 1 << 20)
        places = _numbers("--needle-depths", needle_depths, 0, 100)
        with progress_bars() as progress:
            if plan is None:
                found, _ = plan_cache().load_or_compute(base, PlanRequest((SELF,)), progress)
                substitutes = plan_cache().substitutes(found)
            else:
                found, substitutes = read_with_substitutes(plan)
                found.check_fits(base)
            evaluator = Evaluator(base, found, substitutes, _depths(found, drop), amount, progress)
            for source in text or ():
                evaluator.text(source)
            for source in conversation or ():
                evaluator.conversation(source)
            for path in multiple_choice or ():
                evaluator.multiple_choice(path)
            for path in ifeval or ():
                evaluator.instructions(path)
            evaluator.needle((text or [SELF])[0], lengths, places)
            if task:
                evaluator.tasks(task)
        result = evaluator.result()
        if output is not None:
            write_evidence(output, result)
    _print(result, found, substitutes)


def _depths(plan: Plan, drops: list[str] | None) -> list[int]:
    most = len(plan.ranking)
    return [
        parse_drop(drop, layers=plan.model.layers, most=most) for drop in drops or [str(plan.drop)]
    ]


def _numbers(option: str, text: str, least: int, most: int) -> list[int]:
    """Return the numbers that `512,1024` names; none for an empty text."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not (part.isascii() and part.isdigit() and least <= int(part[:9]) <= most):
            raise EvidenceError(f"{option} takes numbers of {least} to {most}, not {part!r:.40}")
    return [int(part) for part in parts]


def _print(result: Evaluation, plan: Plan, substitutes: Substitutes | None) -> None:
    console = Console()
    console.print(
        f"plan {result.plan} ({result.strategy}) of {result.model}, {result.dtype} on "
        f"{result.device}",
        highlight=False,
    )
    for table in tables(result):
        console.print(table)
    if substitutes is not None:
        for depth in sorted({row.dropped for row in result.figures} - {0}):
            console.print(f"{depth} dropped: {substitutes.described(plan.dropped_layers(depth))}")
