"""What limits healed plans: the same training with ever more of the pruned model free to move.

    python -m benchmarks.headroom --plan plan.json --drop 8 --text TEXT.txt --prompts CHAT.jsonl
    python -m benchmarks.headroom ... --corpus-only      # then one process a set, side by side
    python -m benchmarks.headroom ... --sets maps,weights --learning-rate weights=1e-4,3e-4

`maps` is what `attndrop heal` trains; every other set trains additions.py's parts as well, from
the same start, on the same batches, with the same loss, schedule and early stop, as long, and is
judged on the same held-out rows. `weights` is the ceiling, which serves no two variants from one
copy. A part that gains much says where capacity is missing. Beside the held-out rows stand as many
that were trained on: where these gain and the others do not, it is not capacity that is missing but
text. The corpus and the fit lie in the cache, as heal's do; no plan is written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.additions import MAPS, SETS, WEIGHTS, student
from benchmarks.inprocess import machine
from pruning.batches import Batches
from pruning.calibration import DEFAULT_SEED, Progress
from pruning.checkpoint import Checkpoint, State
from pruning.cli import (
    DeviceOption,
    DropOption,
    ModelOption,
    plan_cache,
    progress_bars,
    user_errors,
)
from pruning.coordinates import Trainee
from pruning.corpus import Source
from pruning.distil import Additions, Distillation, HealError, Training
from pruning.divergence import Baseline, Quality
from pruning.heal import Healer, HealRequest, Task
from pruning.heal_cli import (
    AnswersOption,
    BatchOption,
    FitTokensOption,
    JudgeEveryOption,
    KindOption,
    LengthOption,
    MinutesOption,
    PromptsOption,
    RefitOption,
    SeedOption,
    StepsOption,
    TextOption,
    WrittenOption,
    amount_on,
    depth_of,
    kind_of,
)
from pruning.held_out import HeldOut, mean_kl
from pruning.loading import EMBEDDED_MODEL, BaseModel, cache_folder, load_base_model
from pruning.plan import Plan, read_with_substitutes
from pruning.plan_cache import PlanRequest
from pruning.selection import GREEDY
from pruning.substitutes import SubstituteKind, Substitutes
from pruning.twin import Twin

RATES: Mapping[str, Mapping[str, float]] = {
    "cuda": {
        "maps+scales": 1e-2,
        "maps+attention": 3e-3,
        "maps+mlps": 3e-3,
        "maps+all": 3e-3,
        WEIGHTS: 3e-4,
    },
    "cpu": {
        "maps+scales": 1e-2,
        "maps+attention": 1e-3,
        "maps+mlps": 2e-3,
        "maps+all": 1e-3,
        WEIGHTS: 3e-5,
    },
}
"""The highest learning rates of what each set trains beside the maps, whose rate is heal's. In 30
steps of 256 tokens on a CPU, thrice these left attention and weights hardly better than the fit.
Batches on a GPU are many times larger and bear longer steps; a conclusion needs a sweep there."""
_WIDTH_OF_SETS, _WIDTH_OF_SOURCE = 90, 26


@dataclass(frozen=True, slots=True)
class Trial:
    """One set, to be trained with these rates."""

    set: str
    maps_rate: float
    rate: float | None
    """Of what is trained beside the maps; None: nothing is."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a pruned model is worth, by source."""

    held_out: Mapping[str, Quality]
    trained_on: Mapping[str, Quality]
    """On as many rows that are trained on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial gave."""

    set: str
    maps_rate: float
    rate: float | None
    parameters: int
    compiled: bool
    steps: int
    best_step: int
    tokens: int
    seconds: float
    before: Judged
    """The fit."""
    after: Judged
    """The best weights."""


class _NotKept(Checkpoint):
    """A measurement that is broken off starts over; all weights are too much to write."""

    def __init__(self) -> None:
        super().__init__(Path())

    def save(self, *_: object) -> None:
        pass

    def load(self, *_: object) -> State | None:
        return None


def main(
    plan: Annotated[
        Path | None, typer.Option(help="A plan file; without it, greedy's with linear maps.")
    ] = None,
    model: ModelOption = EMBEDDED_MODEL,
    drop: DropOption = None,
    sets: Annotated[str, typer.Option(help="What is trained, one after the other.")] = ",".join(
        SETS
    ),
    text: TextOption = None,
    prompts: PromptsOption = None,
    written: WrittenOption = None,
    answers: AnswersOption = None,
    kind: KindOption = None,
    refit: RefitOption = False,
    fit_tokens: FitTokensOption = None,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    rank: Annotated[int, typer.Option(min=1, help="Of every low-rank addition.")] = 32,
    learning_rate: Annotated[
        list[str] | None,
        typer.Option(
            help="SET=RATE[,RATE...]: the highest one of what a set adds to the maps (of the maps "
            "themselves for maps); the set is trained once with each. Repeatable."
        ),
    ] = None,
    maps_learning_rate: Annotated[
        float | None, typer.Option(help="The highest one of the maps; heal's, if not given.")
    ] = None,
    batch: BatchOption = None,
    length: LengthOption = None,
    judge_every: JudgeEveryOption = None,
    corpus_only: Annotated[
        bool, typer.Option("--corpus-only", help="Make the corpus and the fit, train nothing.")
    ] = False,
    seed: SeedOption = DEFAULT_SEED,
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Train every set and print what each reaches."""
    with user_errors(), progress_bars() as progress:
        base = load_base_model(model, dtype="float32", device=device)
        found, substitutes = _plan(plan, base, progress)
        amount = amount_on(base)
        training = amount.training(
            minutes=minutes,
            steps=steps,
            learning_rate=maps_learning_rate,
            batch=batch,
            judge_every=judge_every,
            seed=seed,
        )
        chosen = list(trials(sets.split(","), training, learning_rate or (), base.device.type))
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
            training=training,
            kind=kind_of(kind),
            refit=refit,
            fit_tokens=amount.fit_tokens if fit_tokens is None else fit_tokens,
        )
        healer = Healer(base, found, substitutes, cache_folder() / "heal", progress)
        task = healer.prepared(request)
        start = healer.trainees(task)
        if corpus_only:
            return
        outcomes: list[Outcome] = []
        for each in chosen:
            outcomes.append(_outcome(base, task, start, each, rank, progress))
            if output is not None:  # what is done is kept, whatever ends the rest
                body = json.dumps(_body(outcomes, task, base, rank), indent=2)
                output.write_text(body + "\n")
    _print(outcomes, task, rank)


def trials(
    sets: Sequence[str], training: Training, rates: Sequence[str], device: str
) -> Iterator[Trial]:
    """Yield what is to be trained.

    Args:
        rates: texts of the form SET=RATE[,RATE...].
        device: whose rates are taken where none are given.

    Raises:
        HealError: a set is not known, or a rate is not usable.
    """
    given = dict(_rates(each) for each in rates)
    if unknown := sorted({*sets, *given} - SETS.keys()):
        raise HealError(f"there are no sets {unknown}; the sets are {', '.join(SETS)}")
    defaults = {MAPS: training.learning_rate, **RATES.get(device, RATES["cpu"])}
    for name in sets:
        for rate in given.get(name, (defaults[name],)):
            checked = replace(training, learning_rate=rate)
            if name == MAPS:
                yield Trial(name, checked.learning_rate, None)
            else:
                yield Trial(name, training.learning_rate, checked.learning_rate)


def _rates(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, rates = text.partition("=")
    try:
        return name, tuple(float(each) for each in rates.split(","))
    except ValueError as error:
        raise HealError(
            f"--learning-rate must be SET=RATE, such as {WEIGHTS}=1e-4, not {text!r}"
        ) from error


def _plan(
    path: Path | None, base: BaseModel, progress: Progress
) -> tuple[Plan, Substitutes | None]:
    """Return the plan that is given, or one that heals well."""
    if path is not None:
        return read_with_substitutes(path)
    request = PlanRequest(strategy=GREEDY, substitutes=SubstituteKind(None))
    made, _ = plan_cache().load_or_compute(base, request, progress)
    return made, plan_cache().substitutes(made)


def _outcome(
    base: BaseModel,
    task: Task,
    start: Mapping[int, Trainee],
    trial: Trial,
    rank: int,
    progress: Progress,
) -> Outcome:
    """Train one set. `start` stays as it is."""
    torch.compiler.reset()  # each pays for what it compiles, and no limit of variants is shared
    training = replace(task.request.training, learning_rate=trial.maps_rate)
    own = student(base, task.layers, trial.set, rank=rank, seed=training.seed)
    compiled = base.device.type == "cuda"
    judging = Twin(base, task.layers, layers=own.layers)
    known = HeldOut(base, judging, [_turned(each) for each in task.sources])
    fitted = known.qualities({k: each.folded(torch.float32) for k, each in start.items()})
    distillation = Distillation(
        base,
        Twin(base, task.layers, compiled=compiled, layers=own.layers),
        copy.deepcopy(start),
        Batches(task.training, training.batch, training.seed),
        HeldOut(base, judging, task.sources),
        training,
        _NotKept(),
        lambda what, done, total: progress(f"{trial.set}: {what}", done, total),
        None if trial.rate is None else Additions(own.parts, trial.rate),
    )
    distilled = distillation.run()
    return Outcome(
        trial.set,
        trial.maps_rate,
        trial.rate,
        distillation.parameters,
        compiled,
        distilled.steps,
        distilled.best_step,
        distilled.tokens,
        distilled.seconds,
        Judged(distillation.started, fitted),
        Judged(distilled.qualities, known.qualities(distilled.substitutes)),
    )


def _turned(source: Source) -> Source:
    """Return the source with as many training rows as are held out in their place."""
    count = min(len(source.held_out), len(source.training))
    rows = source.training[torch.arange(count) * len(source.training) // count]
    return replace(source, held_out=rows)


def _print(outcomes: Sequence[Outcome], task: Task, rank: int) -> None:
    baselines = task.held_out.baselines
    table = Table(
        title=f"{len(task.layers)} dropped, additions of rank {rank}: "
        "perplexity over full's / KL / agreement",
        title_justify="left",
    )
    table.add_column("set")
    headings = ("rate", "parameters", "steps", "best", "seconds", "KL", "trained on")
    for heading in (*headings, *(Path(name).name for name in baselines)):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("fitted", *[""] * 5, *_cells(outcomes[0].before, baselines))
    for each in outcomes:
        numbers = (each.steps, each.best_step, round(each.seconds))
        table.add_row(
            each.set,
            f"{each.maps_rate if each.rate is None else each.rate:g}",
            f"{each.parameters:,}",
            *map(str, numbers),
            *_cells(each.after, baselines),
        )
    Console(width=_WIDTH_OF_SETS + _WIDTH_OF_SOURCE * len(baselines)).print(table)


def _cells(judged: Judged, baselines: Mapping[str, Baseline]) -> Iterator[str]:
    """Yield the mean KL of held-out rows and of others, and each source's held-out quality."""
    yield f"{mean_kl(judged.held_out):.4f}"
    yield f"{mean_kl(judged.trained_on):.4f}"
    for name, full in baselines.items():
        found = judged.held_out[name]
        ratio = found.perplexity / full.perplexity
        yield f"{ratio:.3f} / {found.kl:.4f} / {found.agreement:.3f}"


def _body(outcomes: Sequence[Outcome], task: Task, base: BaseModel, rank: int) -> dict[str, object]:
    """Return the figures as JSON holds them."""
    return {
        "machine": machine(base.device),
        "model": base.name,
        "plan": task.plan.id,
        "dropped": list(task.layers),
        "rank": rank,
        "training": asdict(task.request.training),
        "corpus": asdict(task.request.corpus),
        "full": {name: asdict(each) for name, each in task.held_out.baselines.items()},
        "rows": [asdict(each) for each in outcomes],
    }


if __name__ == "__main__":
    typer.run(main)
