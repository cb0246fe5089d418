"""`attndrop plan`: compute, show, import and export plans.

Results go to stdout or to a file; progress, logs and errors go to stderr. A user's mistake is one
sentence and exit code 1. Knows the plan files and how to load a model; knows nothing of serving.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
from pruning.calibration import CalibrationError
from pruning.export.errors import ExportError
from pruning.importance import ImportanceError
from pruning.llm_drop import plan_from_llm_drop, write_drop_lists
from pruning.loading import EMBEDDED_MODEL, BaseModel, ModelError, cache_folder, load_base_model
from pruning.plan import (
    DEFAULT_DROP,
    Plan,
    PlanCache,
    PlanError,
    PlanRequest,
    parse_layers,
    plan_json,
    read_plan,
    write_plan,
)
from pruning.selection import ALWAYS_KEPT, DEFAULT_STRATEGY

_BAR_WIDTH = 30


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
OutputOption = Annotated[
    Path | None, typer.Option(help="The plan file to write. Without it the plan goes to stdout.")
]


@plan_app.command()
def compute(
    model: ModelOption = EMBEDDED_MODEL,
    drop: DropOption = DEFAULT_DROP,
    calibration_spec: Annotated[
        str,
        typer.Option(
            "--calibration",
            help="self (text the model writes), a text or .jsonl file, or "
            "hf:NAME[:CONFIG][:SPLIT][:COLUMN].",
        ),
    ] = calibration.SELF,
    samples: Annotated[
        int, typer.Option(help="Calibration sequences.")
    ] = calibration.DEFAULT_SAMPLES,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = calibration.DEFAULT_LENGTH,
    seed: Annotated[int, typer.Option(help="Of text the model writes.")] = calibration.DEFAULT_SEED,
    protect: Annotated[str, typer.Option(help="Layers never to drop, like 1,2,29.")] = "",
    strategy: Annotated[str, typer.Option(help="How layers are ranked.")] = DEFAULT_STRATEGY,
    output: OutputOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Measure again, even if cached.")] = False,
) -> None:
    """Measure every layer's importance and write a plan."""
    with user_errors():
        request = PlanRequest(
            calibration_spec, samples, length, seed, strategy, parse_layers(protect)
        )
        base = load_base_model(model, dtype=dtype, device=device)
        with progress_bars() as progress:
            plan, origin = _measured(base, request, progress, force)
        _deliver(plan.dropping(drop or DEFAULT_DROP), output, origin)


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
    """Make a plan of the attention that an LLM-Drop checkpoint drops."""
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
    _say(f"wrote {len(chosen.dropped_layers())} dropped layers of plan {chosen.id} into {config}")


def plan_cache() -> PlanCache:
    """Return the user's cache of plans."""
    return PlanCache(cache_folder() / "plans")


def _measured(
    base: BaseModel, request: PlanRequest, progress: calibration.Progress, force: bool
) -> tuple[Plan, str]:
    """Return the plan and where it came from; `force` measures even what is cached."""
    cache = plan_cache()
    if force:
        return cache.compute(base, request, progress), "computed"
    return cache.load_or_compute(base, request, progress)


def _deliver(plan: Plan, output: Path | None, origin: str) -> None:
    """Write the plan to its file, or to stdout, and say so on stderr."""
    if output is None:
        typer.echo(plan_json(plan), nl=False)
    else:
        write_plan(output, plan)
    place = "" if output is None else f" in {output}"
    dropped = ", ".join(map(str, sorted(plan.dropped_layers()))) or "none"
    _say(
        f"plan {plan.id} ({origin}){place}: drops {plan.drop} of {plan.model.layers} layers "
        f"of {plan.model.name}: {dropped}"
    )


# What a person sees.


def _heading(plan: Plan) -> str:
    calibrated = "nothing was measured"
    if (data := plan.calibration) is not None:
        seed = "" if data.seed is None else f", seed {data.seed}"
        calibrated = f"{data.samples} x {data.length} tokens of {data.source}{seed}"
    return (
        f"plan {plan.id}: {plan.model.name} ({plan.model.family}, {plan.dtype}), "
        f"drops {plan.drop} of {plan.model.layers} layers\n"
        f"strategy {plan.strategy}; calibration: {calibrated}; made {plan.created}"
    )


def _table(plan: Plan) -> Table:
    """Return one row per layer: its cost as a bar, its place in the ranking, and its fate."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("order", justify="right")
    table.add_column("importance" if plan.strategy == "cosine" else "cost", justify="right")
    table.add_column("", width=_BAR_WIDTH)
    table.add_column("attention")
    steps = {step.layer: (place, step.cost) for place, step in enumerate(plan.ranking, start=1)}
    highest = max((step.cost or 0.0 for step in plan.ranking), default=0.0)
    dropped = plan.dropped_layers()
    for layer in range(plan.model.layers):
        place, cost = steps.get(layer, (None, None))
        table.add_row(
            str(layer),
            "" if place is None else str(place),
            "" if cost is None else f"{cost:.5f}",
            _bar(cost, highest),
            "dropped" if layer in dropped else _why_kept(plan, layer),
            style="dim" if layer in dropped else None,
        )
    return table


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
        if what not in self._tasks:
            self._bars.start()
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can put right into one sentence on stderr and exit code 1."""
    try:
        yield
    except (ModelError, CalibrationError, ImportanceError, PlanError, ExportError) as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from error
