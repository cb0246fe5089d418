"""What plans are worth: layers dropped by several strategies, on text, conversation and questions.

    python -m benchmarks.quality --data FOLDER --out docs/quality.md
    python -m benchmarks.quality --data FOLDER --plan healed.json --results build/quality
    python -m benchmarks.quality --data FOLDER --quick                    # a CPU, to the terminal

Makes plans by cosine, by greedy and by greedy with linear substitutes, all from one mixture of
calibration text, times that, and evaluates them at the same depths, and any given plans too (healed
ones at the depth they are for). WikiText is cut in two: the last two fifths judge, and the first
three are written to the results folder as `wikitext_fit.txt`, for healing. No part of what plans
are judged on chose or fitted anything. What `--results` holds of an earlier run that
answers the same question is not measured again. FOLDER holds `calibration/`, `eval/` and `chat/`
(docs/quality.md names the files). The page's figures stand between two markers; what is around
them stays. The evidence is also what `attndrop report` shows.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.quality_page import Measured, figures, with_figures
from benchmarks.quality_results import Results
from pruning.calibration import SELF, Progress
from pruning.cli import DeviceOption, DtypeOption, ModelOption, progress_bars, user_errors
from pruning.evaluate import Evaluator
from pruning.evidence import Amount, EvidenceError
from pruning.files import write_atomically
from pruning.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from pruning.plan import Plan, read_with_substitutes
from pruning.plan_cache import PlanRequest, compute_plan
from pruning.selection import DEFAULT_STRATEGY, GREEDY
from pruning.substitutes import Substitutes, parse_substitutes

CALIBRATION = (
    "calibration/cal_c4.txt",
    "calibration/cal_wiki.txt",
    "chat/dolly_hhrlhf_small.jsonl",
)
TEXT = "eval/wikitext2_valid.txt"
CONVERSATION = "chat/mt_bench.jsonl"
INSTRUCTIONS = "chat/ifeval.jsonl"
_CHECKS = ("lm_eval", "langdetect", "immutabledict", "nltk")
"""What IFEval's checks need; without one of them, the page says that they were not made."""
QUESTIONS = ("arc_easy_val", "piqa_valid", "hellaswag_val_1000", "openbookqa_val", "winogrande_val")

_FIT = 0.6
"""The share of WikiText that may be trained on."""

STRATEGIES = (
    ("cosine", DEFAULT_STRATEGY, "none"),
    ("greedy", GREEDY, "none"),
    ("greedy + linear", GREEDY, "linear"),
)
"""Name, strategy and substitutes of the plans that are made."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured, and on how much plans are made."""

    amount: Amount
    samples: int
    length: int
    candidates: int
    lengths: tuple[int, ...]
    """Tokens of texts that sentences are hidden in."""
    places: tuple[int, ...]


FULL = Size(
    Amount(
        windows=64,
        length=1024,
        prompts=80,
        answer=256,
        items=2000,
        instructions=128,
        instructed_answer=384,
    ),
    samples=256,
    length=256,
    candidates=29,
    lengths=(512, 1024, 2048),
    places=(0, 25, 50, 75, 100),
)
QUICK = Size(
    Amount(
        windows=2,
        length=64,
        prompts=2,
        answer=8,
        items=2,
        instructions=2,
        instructed_answer=8,
        needles=2,
    ),
    samples=8,
    length=32,
    candidates=2,
    lengths=(256,),
    places=(50,),
)


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A plan that is judged."""

    name: str
    plan: Plan
    substitutes: Substitutes | None
    seconds: float | None
    """What it took to make; None for one that was given."""


def main(
    data: Annotated[Path, typer.Option(help="The folder with calibration/, eval/ and chat/.")],
    plan: Annotated[
        list[Path] | None, typer.Option(help="A plan file to judge too. Repeatable.")
    ] = None,
    drop: Annotated[str, typer.Option(help="Layers to drop.")] = "4,8,12,15",
    out: Annotated[
        Path | None, typer.Option(help="The page whose figures are replaced; else to stdout.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder where plans and evidence are kept.")] = Path(
        "build/quality"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Little of everything.")] = False,
    given_only: Annotated[
        bool, typer.Option("--given-only", help="Judge only plans given by --plan.")
    ] = False,
    model: ModelOption = EMBEDDED_MODEL,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Measure and write the page."""
    size, kept = QUICK if quick else FULL, Results(results)
    with user_errors(), progress_bars() as progress:
        base = load_base_model(model, dtype=dtype, device=device)
        depths = [int(each) for each in drop.split(",")]
        subjects = [] if given_only else made(base, data, size, kept, progress)
        subjects += [_given(path, base) for path in plan or ()]
        if not subjects:
            raise EvidenceError("--given-only needs a --plan to judge")
        text = judging_text(data / TEXT, results)
        judged = [judge(base, each, data, text, size, depths, kept, progress) for each in subjects]
    page = figures(judged, machine(base), command(quick, plan or ()))
    if out is None:
        typer.echo(page)
    else:
        write_atomically(out, with_figures(out, page).encode())


def judging_text(path: Path, results: Path) -> Path:
    """Cut a text at the first heading (` = Title = `) after three fifths of its lines. Return the
    file that holds the end; the beginning is written beside it, as `wikitext_fit.txt`.

    Raises:
        EvidenceError: the text is not readable.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise EvidenceError(f"cannot read {path}: {error}") from error
    cut = int(_FIT * len(lines))
    headings = (at for at in range(cut, len(lines)) if re.fullmatch(r" = [^=]+ = \n", lines[at]))
    cut = next(headings, cut)
    for name, part in (("wikitext_fit.txt", lines[:cut]), ("wikitext_judge.txt", lines[cut:])):
        write_atomically(results / name, "".join(part).encode())
    return results / "wikitext_judge.txt"


def made(
    base: BaseModel, data: Path, size: Size, results: Results, progress: Progress
) -> list[Subject]:
    """Return a plan of each strategy."""
    sources = (SELF, *(str(data / name) for name in CALIBRATION))
    subjects = []
    for name, strategy, substitutes in STRATEGIES:
        request = PlanRequest(
            calibration=sources,
            samples=size.samples,
            length=size.length,
            strategy=strategy,
            candidates=size.candidates,
            substitutes=parse_substitutes(substitutes),
        )
        if (found := results.plan(name, request, base)) is None:
            start = time.perf_counter()
            plan, maps = compute_plan(base, request, progress)
            found = plan, maps, time.perf_counter() - start
            results.keep_plan(name, *found)
        subjects.append(Subject(name, *found))
    return subjects


def judge(
    base: BaseModel,
    subject: Subject,
    data: Path,
    text: Path,
    size: Size,
    depths: Sequence[int],
    results: Results,
    progress: Progress,
) -> Measured:
    """Return a plan's evidence."""
    plan, maps = subject.plan, subject.substitutes
    if plan.substitutes is not None and plan.substitutes.healed is not None:
        depths = (plan.substitutes.healed.drop,)
    if (found := results.evidence(subject.name, plan, base, size.amount, depths)) is None:
        start = time.perf_counter()
        evaluator = Evaluator(base, plan, maps, depths, size.amount, progress)
        _measure(evaluator, data, text, size)
        found = evaluator.result(), time.perf_counter() - start
        results.keep_evidence(subject.name, *found)
    sizes = {
        depth: (0, 0) if maps is None else maps.size(plan.dropped_layers(depth)) for depth in depths
    }
    return Measured(subject.name, plan, found[0], sizes, subject.seconds, found[1])


def _measure(evaluator: Evaluator, data: Path, text: Path, size: Size) -> None:
    evaluator.text(str(text))
    evaluator.conversation(str(data / CONVERSATION))
    for name in QUESTIONS:
        evaluator.multiple_choice(data / "eval" / f"{name}.jsonl")
    evaluator.needle(str(text), size.lengths, size.places)
    if all(find_spec(name) for name in _CHECKS):
        evaluator.instructions(data / INSTRUCTIONS)


def machine(base: BaseModel) -> str:
    """Return what this was measured on."""
    if base.device.type == "cuda":
        return torch.cuda.get_device_name(base.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def command(quick: bool, plans: Sequence[Path]) -> str:
    """Return the command that measures this again; the folder's place is the reader's own."""
    options = [f"--plan {path.name}" for path in plans] + ["--quick"] * quick
    return " ".join(["python -m benchmarks.quality --data FOLDER", *options])


def _given(path: Path, base: BaseModel) -> Subject:
    plan, substitutes = read_with_substitutes(path)
    plan.check_fits(base)
    return Subject(path.name.removesuffix(".json"), plan, substitutes, None)


if __name__ == "__main__":
    typer.run(main)
