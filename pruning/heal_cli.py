"""`attndrop heal`: recover what a plan's drop costs, by substitutes that are fitted and trained.

The table goes to stdout, progress and errors to stderr. Knows the options; heal.py does the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from pruning.plan import (
    Plan,
    PlanError,
    parse_drop,
    read_with_substitutes,
    substitutes_path,
    write_plan,
)
from pruning.substitutes import SubstituteKind, parse_substitutes


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

    def corpus(
        self,
        *,
        written: int | None,
        texts: Sequence[str],
        prompts: Sequence[str],
        answers: int | None,
        length: int | None,
        seed: int,
    ) -> CorpusRequest:
        """Return what a user asks for, None being what is here."""
        return CorpusRequest(
            written=self.written if written is None else written,
            texts=tuple(texts),
            prompts=tuple(prompts),
            answers=self.answers if answers is None else answers,
            length=self.length if length is None else length,
            seed=seed,
        )

    def training(
        self,
        *,
        minutes: float | None,
        steps: int | None,
        learning_rate: float | None,
        batch: int | None,
        judge_every: int | None,
        seed: int,
    ) -> Training:
        """Return what a user asks for, None being what is here."""
        if steps is None and minutes is None:
            minutes = self.minutes
        return Training(
            steps=steps,
            seconds=None if minutes is None else minutes * 60,
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            batch=self.batch if batch is None else batch,
            judge_every=self.judge_every if judge_every is None else judge_every,
            seed=seed,
        )


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


TextOption = Annotated[
    list[str] | None, typer.Option(help="A text or .jsonl file to train on. Repeatable.")
]
PromptsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A JSON-lines file of chat prompts (messages, prompt or turns), which the full "
        "model answers, to train on the answers; or self, for prompts that it writes too. "
        "Repeatable."
    ),
]
WrittenOption = Annotated[
    int | None,
    typer.Option(min=0, help="Tokens of text that the full model writes, to train on."),
]
AnswersOption = Annotated[
    int | None, typer.Option(help="Prompts of each file that are answered at most.")
]
KindOption = Annotated[
    str | None,
    typer.Option(help="What is fitted: linear or linear:RANK. Default: the plan's, or linear."),
]
RefitOption = Annotated[
    bool, typer.Option("--refit", help="Fit again where the plan has substitutes.")
]
FitTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Training tokens that the fit takes.")
]
MinutesOption = Annotated[
    float | None, typer.Option(help="How long to train, writing and fitting not counted.")
]
StepsOption = Annotated[
    int | None, typer.Option(help="How many steps to train instead; 0 fits only.")
]
BatchOption = Annotated[int | None, typer.Option(help="Sequences of a step.")]
LengthOption = Annotated[int | None, typer.Option(help="Tokens of a sequence.")]
JudgeEveryOption = Annotated[
    int | None, typer.Option(help="Steps between two looks at the held-out part.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of text, answers and order.")]


def heal_command(
    plan: Annotated[Path, typer.Option(help="The plan file to heal.")],
    output: Annotated[Path, typer.Option(help="The plan file to write.")],
    model: ModelOption = EMBEDDED_MODEL,
    drop: DropOption = None,
    text: TextOption = None,
    prompts: PromptsOption = None,
    written: WrittenOption = None,
    answers: AnswersOption = None,
    kind: KindOption = None,
    refit: RefitOption = False,
    fit_tokens: FitTokensOption = None,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The highest one, as a share of what each output varies by."),
    ] = None,
    batch: BatchOption = None,
    length: LengthOption = None,
    judge_every: JudgeEveryOption = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="Another depth whose quality to measure again. Repeatable."),
    ] = None,
    seed: SeedOption = DEFAULT_SEED,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Recover what a plan's drop costs: fit and train what stands in dropped layers' places."""
    with user_errors(), _interruptible():
        found, substitutes = read_with_substitutes(plan)
        wanted = kind_of(kind)
        if not output.resolve().parent.is_dir():
            raise PlanError(f"cannot write plan {output}: its folder does not exist")
        base = load_base_model(model, dtype=dtype, device=device)
        amount = amount_on(base)
        request = HealRequest(
            drop=found.drop if drop is None else depth_of(drop, base, found),
            corpus=amount.corpus(
                written=written,
                texts=text or (),
                prompts=prompts or (),
                answers=answers,
                length=length,
                seed=seed,
            ),
            training=amount.training(
                minutes=minutes,
                steps=steps,
                learning_rate=learning_rate,
                batch=batch,
                judge_every=judge_every,
                seed=seed,
            ),
            kind=wanted,
            refit=refit,
            fit_tokens=amount.fit_tokens if fit_tokens is None else fit_tokens,
            depths=tuple(depth_of(each, base, found) for each in measure or ()),
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


def depth_of(drop: str, base: BaseModel, plan: Plan) -> int:
    """Return how many of a plan's layers a user wants dropped.

    Raises:
        PlanError: not a number or a share, or more than are ranked.
    """
    return parse_drop(drop, layers=base.layers, most=len(plan.ranking))


def kind_of(text: str | None) -> SubstituteKind | None:
    """Return the substitutes that a user wants fitted; None: the plan's.

    Raises:
        PlanError, SubstituteError: there would be none, or the text is something else.
    """
    if text is None:
        return None
    if (kind := parse_substitutes(text)) is None:
        raise PlanError("--kind none leaves nothing to heal; give linear or linear:RANK")
    return kind


def amount_on(base: BaseModel) -> Amount:
    """Return how much is done on a model's device where nobody says."""
    return AMOUNTS.get(base.device.type, AMOUNTS["cpu"])


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
