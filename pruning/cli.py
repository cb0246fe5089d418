"""`attndrop plan`: compute, show, import and export plans.

Results go to stdout or to a file; progress, logs and errors go to stderr. A user's mistake is one
sentence and exit code 1. Knows the plan files and how to load a model; knows nothing of serving.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from pruning import calibration
from pruning.budget import DEFAULT_BUDGET, Budget, BudgetError, chosen
from pruning.calibration import CalibrationError
from pruning.checkpoint import CheckpointError
from pruning.distil import HealError
from pruning.divergence import DivergenceError, Quality
from pruning.evidence import EvidenceError
from pruning.export.errors import ExportError
from pruning.importance import ImportanceError
from pruning.llm_drop import plan_from_llm_drop, write_drop_lists
from pruning.loading import EMBEDDED_MODEL, BaseModel, ModelError, cache_folder, load_base_model
from pruning.plan import (
    Plan,
    PlanError,
    parse_layers,
    plan_json,
    read_plan,
    substitutes_path,
    write_plan,
)
from pruning.plan_cache import PlanCache, PlanRequest, Wanted
from pruning.search import DEFAULT_EVALUATIONS
from pruning.selection import ALWAYS_KEPT, DEFAULT_CANDIDATES, DEFAULT_STRATEGY, Searched
from pruning.substitutes import SubstituteError, Substitutes, parse_substitutes
from pruning.targets import ATTENTION, BLOCK, JOINED, JOINT, MLP, Sublayers

_BAR_WIDTH = 10

USER_ERRORS = (
    ModelError,
    CalibrationError,
    ImportanceError,
    DivergenceError,
    BudgetError,
    SubstituteError,
    PlanError,
    EvidenceError,
    ExportError,
    CheckpointError,
    HealError,
)
"""What a user can put right."""


class _ComputeByDefault(TyperGroup):
    """`attndrop plan --model M` means `attndrop plan compute --model M`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["compute", *args]
        return super().parse_args(ctx, args)


plan_app = typer.Typer(
    cls=_ComputeByDefault,
    no_args_is_help=True,
    help="Compute, show, import and export plans: which layers lose their attention. "
    "`attndrop plan OPTIONS` is short for `attndrop plan compute OPTIONS`.",
)

ModelOption = Annotated[
    str, typer.Option("--model", help="A Hugging Face id, a checkpoint folder or a .gguf file.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DropOption = Annotated[
    str | None, typer.Option(help="Layers to drop: a number (8) or a share of all layers (25%).")
]
AutoDropOption = Annotated[
    str | None,
    typer.Option(
        "--drop",
        help="Layers to drop: a number (8), a share of all layers (25%), or auto: as many as a "
        f"budget allows. Without any of these options: {DEFAULT_BUDGET}.",
    ),
]
MaxKlOption = Annotated[
    float | None, typer.Option(help="Budget: KL from the full model, in nats a token.")
]
MinAgreementOption = Annotated[
    float | None, typer.Option(help="Budget: how often the most likely token is the full model's.")
]
MaxRatioOption = Annotated[
    float | None,
    typer.Option("--max-perplexity-ratio", help="Budget: perplexity over the full model's."),
]
OutputOption = Annotated[
    Path | None, typer.Option(help="The plan file to write. Without it the plan goes to stdout.")
]


@plan_app.command()
def compute(
    model: ModelOption = EMBEDDED_MODEL,
    drop: AutoDropOption = None,
    max_kl: MaxKlOption = None,
    min_agreement: MinAgreementOption = None,
    max_perplexity_ratio: MaxRatioOption = None,
    calibration_specs: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            help="self (text the model writes; the default), a text or .jsonl file, or "
            "hf:NAME[:CONFIG][:SPLIT][:COLUMN]. Repeatable: equal shares of each.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Calibration sequences.")
    ] = calibration.DEFAULT_SAMPLES,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = calibration.DEFAULT_LENGTH,
    seed: Annotated[int, typer.Option(help="Of text the model writes.")] = calibration.DEFAULT_SEED,
    protect: Annotated[str, typer.Option(help="Layers never to drop, like 1,2,29.")] = "",
    strategy: Annotated[
        str,
        typer.Option(
            help="How layers are ranked: cosine; greedy: better and slower; or search: greedy, "
            "then swaps at the depth that is asked for."
        ),
    ] = DEFAULT_STRATEGY,
    target: Annotated[
        str,
        typer.Option(
            help="What is dropped: attention; or, by cosine, mlp, block (whole layers), or joint "
            "(attention and MLPs ranked together)."
        ),
    ] = ATTENTION,
    candidates: Annotated[
        int, typer.Option(help="Layers that each step of greedy tries, and swaps that search does.")
    ] = DEFAULT_CANDIDATES,
    evaluations: Annotated[
        int, typer.Option(help="Sets of layers that search tries at most.")
    ] = DEFAULT_EVALUATIONS,
    substitutes: Annotated[
        str,
        typer.Option(
            help="What stands in dropped sublayers' places: none, linear, or linear:RANK. With "
            "--strategy greedy."
        ),
    ] = "none",
    output: OutputOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Measure again, even if cached.")] = False,
) -> None:
    """Measure what every layer's attention, or another target, is worth and write a plan."""
    with user_errors():
        choice = chosen(drop, max_kl, min_agreement, max_perplexity_ratio) or DEFAULT_BUDGET
        request = PlanRequest(
            calibration=tuple(calibration_specs or (calibration.SELF,)),
            samples=samples,
            length=length,
            seed=seed,
            strategy=strategy,
            target=target,
            protected=parse_layers(protect),
            candidates=candidates,
            evaluations=evaluations,
            substitutes=parse_substitutes(substitutes),
        )
        if request.substitutes is not None and output is None:
            raise PlanError("substitutes are written beside the plan; name its file by --output")
        base = load_base_model(model, dtype=dtype, device=device)
        with progress_bars() as progress:
            plan, origin = _measured(base, request, progress, choice, force)
        _deliver(plan.choosing(choice), output, origin, plan_cache().substitutes(plan))


@plan_app.command()
def show(
    plan: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help="A plan or model name.")],
    drop: DropOption = None,
) -> None:
    """Show a plan file, or the newest cached plan of a model, layer by layer."""
    with user_errors():
        path = Path(plan)
        found = read_plan(path) if path.is_file() else plan_cache().latest(plan)
        found = found if drop is None else found.dropping(drop)
    console = Console()
    console.print(_heading(found), highlight=False, markup=False)
    console.print(_table(found))


@plan_app.command("import-llm-drop")
def import_llm_drop(
    config: Annotated[Path, typer.Argument(help="The config.json of an LLM-Drop checkpoint.")],
    model: ModelOption = EMBEDDED_MODEL,
    output: OutputOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Make a plan of what an LLM-Drop checkpoint drops."""
    with user_errors():
        base = load_base_model(model, dtype=dtype, device=device)
        _deliver(plan_from_llm_drop(config, base), output, "imported")


@plan_app.command("export-llm-drop")
def export_llm_drop(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    config: Annotated[Path, typer.Argument(help="The config.json to write the drop lists into.")],
    drop: DropOption = None,
) -> None:
    """Write the layers a plan drops into a checkpoint's config.json, for LLM-Drop's own code."""
    with user_errors():
        chosen = read_plan(plan) if drop is None else read_plan(plan).dropping(drop)
        write_drop_lists(config, chosen)
    _say(f"wrote {_named(chosen.dropped())}, dropped by plan {chosen.id}, into {config}")


def plan_cache() -> PlanCache:
    """Return the user's cache of plans."""
    return PlanCache(cache_folder() / "plans")


def _measured(
    base: BaseModel,
    request: PlanRequest,
    progress: calibration.Progress,
    choice: str | Budget,
    force: bool,
) -> tuple[Plan, str]:
    """Return the plan and where it came from; `force` measures even what is cached."""
    cache, wanted = plan_cache(), Wanted.by(choice)
    if force:
        return cache.compute(base, request, progress, wanted), "computed"
    return cache.load_or_compute(base, request, progress, wanted)


def _deliver(
    plan: Plan, output: Path | None, origin: str, substitutes: Substitutes | None = None
) -> None:
    """Write the plan to its file, or to stdout, and say so on stderr."""
    if output is None:
        typer.echo(plan_json(plan), nl=False)
    else:
        write_plan(output, plan, substitutes)
    place = "" if output is None else f" in {output}"
    _say(
        f"plan {plan.id} ({origin}){place}: drops {plan.drop} of {plan.whole} "
        f"{_UNITS[plan.target]} of {plan.model.name}: {_named(plan.dropped())}"
    )
    if (evidence := evidence_of(plan)) is not None:
        _say(evidence)
    if plan.searched is not None:
        _say(_searched_text(plan.searched))
    if substitutes is not None and output is not None:
        _say(f"{substitutes.described(plan.dropped_layers())} in {substitutes_path(output)}")


# What a person sees.

_UNITS = {ATTENTION: "layers", MLP: "MLPs", BLOCK: "whole layers", JOINT: "sublayers"}


def _named(dropped: Sublayers) -> str:
    """Return the layers of what is dropped; those of MLPs are named."""
    attention = ", ".join(map(str, sorted(dropped.attention)))
    mlps = ", ".join(map(str, sorted(dropped.mlps)))
    if not mlps:
        return attention or "none"
    return f"attention of {attention or 'none'}; MLPs of {mlps}"


def _heading(plan: Plan) -> str:
    calibrated = "nothing was measured"
    if (data := plan.calibration) is not None:
        seed = "" if data.seed is None else f", seed {data.seed}"
        calibrated = f"{data.samples} x {data.length} tokens of {', '.join(data.sources)}{seed}"
    return (
        f"plan {plan.id}: {plan.model.name} ({plan.model.family}, {plan.dtype}), "
        f"drops {plan.drop} of {plan.whole} {_UNITS[plan.target]}\n"
        f"strategy {plan.strategy}; calibration: {calibrated}; made {plan.created}\n"
        f"substitutes: {_substitutes_of(plan)}\n"
        f"{evidence_of(plan) or 'the quality of this drop was not measured'}"
        + ("" if plan.searched is None else f"\n{_searched_text(plan.searched)}")
    )


def _searched_text(searched: Searched) -> str:
    """Return what a search gave over greedy."""
    tried = f"searched {searched.tried} sets of {searched.depth} layers"
    if searched.found is None:
        return f"{tried}: none is better than greedy's (KL {searched.greedy.kl:.3f})"
    return (
        f"{tried}: KL on held-out tokens {searched.greedy.kl:.3f} (greedy) -> "
        f"{searched.found.kl:.3f}, agreement {searched.greedy.agreement:.3f} -> "
        f"{searched.found.agreement:.3f}"
    )


def _substitutes_of(plan: Plan) -> str:
    """Return what kind the plan has, and how they were healed, if they were."""
    if plan.substitutes is None:
        return "none"
    if (healed := plan.substitutes.healed) is None:
        return plan.substitutes.kind
    lines = [f"{plan.substitutes.kind}, healed for {healed.drop} dropped in {healed.steps} steps"]
    lines += [
        f"    held-out part of {on.source.partition(' ')[0]}: KL {on.before.kl:.3f} -> "
        f"{on.after.kl:.3f}, agreement {on.before.agreement:.3f} -> {on.after.agreement:.3f}"
        for on in healed.on
    ]
    return "\n".join(lines)


def evidence_of(plan: Plan) -> str | None:
    """Return the sentence that says what the plan's drop costs, None where it was not measured."""
    quality = plan.quality()
    if quality is None or plan.held_out is None:
        return None
    budget = f"; the budget was {plan.budget}" if plan.budget is not None else ""
    return (
        f"on {plan.held_out.tokens} held-out tokens: KL {quality.kl:.3f}, agreement "
        f"{quality.agreement:.3f}, perplexity "
        f"{quality.perplexity / plan.held_out.perplexity:.3f} x full's{budget}"
    )


def _table(plan: Plan) -> Table:
    """Return one row per layer: its cost as a bar, its place in the ranking, and its fate. In a
    joint plan, a row for each of its sublayers."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("order", justify="right")
    table.add_column("importance" if plan.strategy == "cosine" else "cost", justify="right")
    table.add_column("", width=_BAR_WIDTH)
    for heading in ("KL", "agreement", "perplexity"):
        table.add_column(heading, justify="right")
    table.add_column(plan.target, no_wrap=True)
    ranked = enumerate(plan.ranking, start=1)
    steps = {(step.layer, step.sublayer): (place, step) for place, step in ranked}
    highest = max((step.cost or 0.0 for step in plan.ranking), default=0.0)
    sublayers = JOINED if plan.target == JOINT else (None,)
    for layer, sublayer in product(range(plan.model.layers), sublayers):
        place, step = steps.get((layer, sublayer), (None, None))
        cost = None if step is None else step.cost
        is_dropped = place is not None and place <= plan.drop
        table.add_row(
            str(layer) if sublayer is None else f"{layer} {sublayer}",
            "" if place is None else str(place),
            "" if cost is None else f"{cost:.5f}",
            _bar(cost, highest),
            *_quality_cells(None if step is None else step.quality),
            "dropped" if is_dropped else _why_kept(plan, layer),
            style="dim" if is_dropped else None,
        )
    return table


def _quality_cells(quality: Quality | None) -> tuple[str, str, str]:
    if quality is None:
        return "", "", ""
    return f"{quality.kl:.3f}", f"{quality.agreement:.3f}", f"{quality.perplexity:.1f}"


def _bar(cost: float | None, highest: float) -> str:
    return "" if cost is None or highest <= 0 else "█" * round(_BAR_WIDTH * cost / highest)


def _why_kept(plan: Plan, layer: int) -> str:
    if layer == ALWAYS_KEPT:
        return "kept always"
    return "kept, protected" if layer in plan.protected else "kept"


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)


@contextmanager
def progress_bars() -> Iterator[calibration.Progress]:
    """Show progress and the log on stderr; yields what library code reports to."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logger = logging.getLogger("pruning")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console)
    logger.addHandler(handler)
    try:
        yield _Reporter(bars)
    finally:
        logger.removeHandler(handler)
        if bars.live.is_started:
            bars.stop()


class _Reporter:
    """Draws one bar for each thing that is being done, and nothing while there is nothing."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        subject = what.partition(",")[0]
        if subject not in self._tasks:
            self._bars.start()
            self._tasks[subject] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[subject], description=what, completed=done, total=total)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can put right into one sentence on stderr and exit code 1."""
    try:
        yield
    except USER_ERRORS as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from error
