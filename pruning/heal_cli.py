"""`attndrop heal`: recover what a plan's drop costs, by substitutes that are fitted and trained.

The table goes to stdout, progress and errors to stderr. Knows the options; heal.py does the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pruning.calibration import DEFAULT_SEED
from pruning.cli import (
    DeviceOption,
    DropOption,
    DtypeOption,
    ModelOption,
    evidence_of,
    plan_cache,
    progress_bars,
    user_errors,
)
from pruning.corpus import CorpusRequest
from pruning.distil import Training
from pruning.divergence import Baseline, Quality
from pruning.heal import Healer, Healing, HealRequest
from pruning.loading import EMBEDDED_MODEL, BaseModel, cache_folder, load_base_model
from pruning.plan import PlanError, parse_drop, read_with_substitutes, substitutes_path, write_plan
from pruning.substitutes import parse_substitutes


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is done where nobody says, which depends on what computes."""

    written: int
    answers: int
    fit_tokens: int
    batch: int
    length: int
    learning_rate: float
    """Larger batches are less noisy and bear longer steps."""
    judge_every: int
    minutes: float


AMOUNTS = {
    "cuda": Amount(
        written=300_000,
        answers=2_000,
        fit_tokens=100_000,
        batch=32,
        length=512,
        learning_rate=0.05,
        judge_every=50,
        minutes=5,
    ),
    "cpu": Amount(
        written=32_768,
        answers=128,
        fit_tokens=24_576,
        batch=4,
        length=256,
        learning_rate=0.01,
        judge_every=10,
        minutes=15,
    ),
}


def heal_command(
    plan: Annotated[Path, typer.Option(help="The plan file to heal.")],
    output: Annotated[Path, typer.Option(help="The plan file to write.")],
    model: ModelOption = EMBEDDED_MODEL,
    drop: DropOption = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A text or .jsonl file to train on. Repeatable.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="A JSON-lines file of chat prompts (messages, prompt or turns), which the full "
            "model answers, to train on the answers; or self, for prompts that it writes too. "
            "Repeatable."
        ),
    ] = None,
    written: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens of text that the full model writes, to train on."),
    ] = None,
    answers: Annotated[
        int | None, typer.Option(help="Prompts of each file that are answered at most.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="What is fitted: linear or linear:RANK. Default: the plan's, or linear."),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit again where the plan has substitutes.")
    ] = False,
    fit_tokens: Annotated[
        int | None, typer.Option(min=1, help="Training tokens that the fit takes.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="How long to train, writing and fitting not counted.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="How many steps to train instead; 0 fits only.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The highest one, as a share of what each output varies by."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    judge_every: Annotated[
        int | None, typer.Option(help="Steps between two looks at the held-out part.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="Another depth whose quality to measure again. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of text, answers and order.")] = DEFAULT_SEED,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Recover what a plan's drop costs: fit and train what stands in dropped layers' places."""
    with user_errors(), _interruptible():
        found, substitutes = read_with_substitutes(plan)
        fitted_kind = None if kind is None else parse_substitutes(kind)
        if kind is not None and fitted_kind is None:
            raise PlanError("--kind none leaves nothing to heal; give linear or linear:RANK")
        if not output.resolve().parent.is_dir():
            raise PlanError(f"cannot write plan {output}: its folder does not exist")
        base = load_base_model(model, dtype=dtype, device=device)
        amount = AMOUNTS.get(base.device.type, AMOUNTS["cpu"])
        if steps is None and minutes is None:
            minutes = amount.minutes
        request = HealRequest(
            drop=found.drop if drop is None else _depth(drop, base, len(found.ranking)),
            corpus=CorpusRequest(
                written=amount.written if written is None else written,
                texts=tuple(text or ()),
                prompts=tuple(prompts or ()),
                answers=amount.answers if answers is None else answers,
                length=amount.length if length is None else length,
                seed=seed,
            ),
            training=Training(
                steps=steps,
                seconds=None if minutes is None else minutes * 60,
                learning_rate=amount.learning_rate if learning_rate is None else learning_rate,
                batch=amount.batch if batch is None else batch,
                judge_every=amount.judge_every if judge_every is None else judge_every,
                seed=seed,
            ),
            kind=fitted_kind,
            refit=refit,
            fit_tokens=amount.fit_tokens if fit_tokens is None else fit_tokens,
            depths=tuple(_depth(each, base, len(found.ranking)) for each in measure or ()),
        )
        with progress_bars() as progress:
            healer = Healer(base, found, substitutes, cache_folder() / "heal", progress)
            healing = healer.heal(request, plan_cache().calibration_of(found))
        write_plan(output, healing.plan, healing.substitutes)
        healing.checkpoint.remove()
    _print(healing, output)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from interrupt


def _depth(drop: str, base: BaseModel, most: int) -> int:
    return parse_drop(drop, layers=base.layers, most=most)


def _print(healing: Healing, output: Path) -> None:
    """Say what healing gave, source by source."""
    plan, distilled = healing.plan, healing.distilled
    assert plan.substitutes is not None
    assert plan.substitutes.healed is not None
    table = Table(title="on the held-out part of each source", box=None, title_justify="left")
    for heading in ("source", "", "KL", "agreement", "perplexity of full"):
        table.add_column(heading, justify="left" if heading in ("source", "") else "right")
    for on, name in zip(plan.substitutes.healed.on, healing.fitted, strict=True):
        stages = {"before": on.before, "fitted": healing.fitted[name], "healed": on.after}
        for stage, quality in stages.items():
            shown = on.source.partition(" ")[0] if stage == "before" else ""
            table.add_row(shown, stage, *_cells(quality, on.held_out))
    console = Console()
    console.print(table)
    for sentence in (
        f"plan {plan.id} in {output}: {plan.drop} of {plan.model.layers} layers dropped, healed in "
        f"{distilled.seconds:.0f} s by {distilled.steps} steps of {distilled.tokens:,} tokens in "
        f"all; the best weights are of step {distilled.best_step}",
        f"{healing.substitutes.described(plan.dropped_layers())} in {substitutes_path(output)}",
        evidence_of(plan) or "",
    ):
        if sentence:
            typer.echo(sentence, err=True)


def _cells(quality: Quality, full: Baseline) -> tuple[str, str, str]:
    return (
        f"{quality.kl:.4f}",
        f"{quality.agreement:.3f}",
        f"{quality.perplexity / full.perplexity:.3f}x",
    )
