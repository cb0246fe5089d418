"""The page docs/quality.md: evidence of several plans as Markdown tables, beside the bars.

Knows what the figures mean and what they are held against; knows nothing of how they are measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pruning.evidence import (
    Choices,
    Evaluation,
    EvidenceError,
    Figures,
    Retrieval,
    average_choices,
)
from pruning.plan import Plan

BEGIN, END = "<!-- figures: written by benchmarks/quality.py -->", "<!-- end of figures -->"
_SHOWN = {"text": "WikiText", "conversation": "conversation"}


@dataclass(frozen=True, slots=True)
class Bar:
    """What a depth has to reach, on text and on conversation."""

    ratio: float
    agreement: float
    choices: float | None
    """Average accuracy; None: within one standard error of the full model."""


BARS = {4: Bar(1.03, 0.90, None), 8: Bar(1.06, 0.85, 0.465), 15: Bar(1.15, 0.75, 0.445)}
"""By layers dropped of the embedded model's 30."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A plan and what was found about it."""

    name: str
    plan: Plan
    found: Evaluation
    substitutes: Mapping[int, tuple[int, int]]
    """Parameters and bytes of each depth's substitutes."""
    plan_seconds: float | None
    evaluation_seconds: float

    def rows(self, domain: str) -> dict[int, Figures]:
        return {row.dropped: row for row in self.found.figures if row.domain == domain}

    def choices(self, depth: int) -> list[Choices]:
        return [row for row in self.found.choices if row.dropped == depth]


def with_figures(path: Path, text: str) -> str:
    """Return the page with its figures replaced.

    Raises:
        EvidenceError: it is not there, or does not hold the two markers.
    """
    try:
        page = path.read_text()
    except OSError as error:
        raise EvidenceError(f"cannot read {path}: {error.strerror}") from error
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise EvidenceError(f"{path} has no place for figures: it needs {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def figures(plans: Sequence[Measured], machine: str, command: str) -> str:
    """Return all tables."""
    parts = [
        _origin(plans, machine, command),
        _overview(plans),
        _bars(plans),
        *(_domain(plans, domain) for domain in _SHOWN),
        _questions(plans),
        _answers(plans),
        _retrieval(plans),
        _following(plans),
        _making(plans),
    ]
    return "\n\n".join(parts) + "\n"


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _origin(plans: Sequence[Measured], machine: str, command: str) -> str:
    found = plans[0].found
    amount, versions = found.amount, found.versions
    domains = "; ".join(
        f"{_SHOWN[each.name]}: {each.tokens:,} predicted tokens in {each.samples} samples of "
        f"`{each.source.split(' ')[0]}`"
        for each in found.domains
    )
    sources = plans[0].plan.calibration
    calibration = (
        "" if sources is None else ", ".join(f"`{each.split(' ')[0]}`" for each in sources.sources)
    )
    return (
        f"`{command}`\n\n"
        f"{found.model}, {found.dtype}, {machine}; attndrop {versions.attndrop}, torch "
        f"{versions.torch}, transformers {versions.transformers}; {found.created[:10]}, seed "
        f"{amount.seed}. {domains} (answers of at most {amount.answer} tokens that the full model "
        f"wrote); multiple choice: {sum(row.items for row in plans[0].choices(0)):,} questions. "
        f"Plans are made of equal shares of {calibration or 'what their files say'}."
    )


def _depths(plan: Measured) -> list[int]:
    return sorted(plan.rows("text"))


def _overview(plans: Sequence[Measured]) -> str:
    depths = sorted({depth for plan in plans for depth in _depths(plan)})
    return _table(
        "At a glance: perplexity / KL / agreement / multiple choice, on WikiText",
        [f"dropped of {plans[0].found.layers}", *(plan.name for plan in plans)],
        [[str(depth), *(_cell(plan, depth) for plan in plans)] for depth in depths],
    )


def _cell(plan: Measured, depth: int) -> str:
    if (row := plan.rows("text").get(depth)) is None:
        return ""
    average, _ = average_choices(plan.choices(depth))
    return f"{row.perplexity:.1f} / {row.kl:.2f} / {row.agreement:.3f} / {average:.3f}"


def _bars(plans: Sequence[Measured]) -> str:
    rows = []
    for depth, bar in BARS.items():
        rows += [_held(plan, depth, bar) for plan in plans if depth in _depths(plan)]
    return _table(
        "Beside the bars (bold: reached)",
        [
            "dropped",
            "plan",
            "ratio, WikiText",
            "ratio, conversation",
            "agreement, WikiText",
            "agreement, conversation",
            "multiple choice",
        ],
        rows,
    )


def _held(plan: Measured, depth: int, bar: Bar) -> list[str]:
    domains = [plan.rows(domain)[depth] for domain in _SHOWN]
    average, _ = average_choices(plan.choices(depth))
    full, full_error = average_choices(plan.choices(0))
    least = full - full_error if bar.choices is None else bar.choices
    return [
        str(depth),
        plan.name,
        *(
            _mark(row.perplexity_ratio, bar.ratio, "≤", row.perplexity_ratio <= bar.ratio)
            for row in domains
        ),
        *(
            _mark(row.agreement, bar.agreement, "≥", row.agreement >= bar.agreement)
            for row in domains
        ),
        _mark(average, least, "≥", average >= least),
    ]


def _mark(value: float, bar: float, sign: str, reached: bool) -> str:
    text = f"{value:.3f}"
    return f"{f'**{text}**' if reached else text} ({sign} {bar:.3g})"


def _domain(plans: Sequence[Measured], domain: str) -> str:
    rows = []
    for plan in plans:
        for depth, row in plan.rows(domain).items():
            if depth or plan is plans[0]:
                rows.append([plan.name if depth else "full model", str(depth), *_precise(row)])
    return _table(
        f"{_SHOWN[domain][0].upper()}{_SHOWN[domain][1:]}, with standard errors over samples",
        [
            "plan",
            "dropped",
            "perplexity",
            "of full",
            "KL",
            "KL p90",
            "KL p99",
            "agreement",
            "agreement, worst tenth of samples",
        ],
        rows,
    )


def _precise(row: Figures) -> list[str]:
    return [
        f"{row.perplexity:.2f}",
        _plus_minus(row.perplexity_ratio, row.perplexity_ratio_error),
        _plus_minus(row.kl, row.kl_error),
        f"{row.kl_p90:.2f}",
        f"{row.kl_p99:.2f}",
        _plus_minus(row.agreement, row.agreement_error),
        f"{row.agreement_p10:.3f}",
    ]


def _questions(plans: Sequence[Measured]) -> str:
    tasks = [row.task for row in plans[0].choices(0)]
    rows = []
    for plan in plans:
        for depth in _depths(plan):
            if depth or plan is plans[0]:
                found = plan.choices(depth)
                unchanged = sum(row.unchanged for row in found) / len(found)
                rows.append(
                    [
                        plan.name if depth else "full model",
                        str(depth),
                        *(_plus_minus(row.accuracy, row.error) for row in found),
                        _plus_minus(*average_choices(found)),
                        f"{unchanged:.0%}",
                    ]
                )
    headings = ["plan", "dropped", *tasks, "average", "choices that are the full model's"]
    return _table("Multiple choice: accuracy and its standard error", headings, rows)


def _answers(plans: Sequence[Measured]) -> str:
    rows = []
    for plan in plans:
        for row in plan.found.health:
            if row.dropped or plan is plans[0]:
                rows.append(
                    [
                        plan.name if row.dropped else "full model",
                        str(row.dropped),
                        f"{row.mean_length:.0f} ± {row.mean_length_error:.0f}",
                        _plus_minus(row.repetition, row.repetition_error),
                        _plus_minus(row.finished, row.finished_error),
                    ]
                )
    headings = ["plan", "dropped", "mean tokens", "repeated four-token runs", "ended by itself"]
    return _table("Answers that each depth wrote itself", headings, rows)


def _retrieval(plans: Sequence[Measured]) -> str:
    lengths = sorted({row.length for row in plans[0].found.retrieval})
    rows = []
    for plan in plans:
        for depth in _depths(plan):
            if depth or plan is plans[0]:
                found = [row for row in plan.found.retrieval if row.dropped == depth]
                cells = [_found([row for row in found if row.length == n]) for n in lengths]
                rows.append([plan.name if depth else "full model", str(depth), *cells])
    places = sorted({row.depth for row in plans[0].found.retrieval})
    return _table(
        f"Sentences found in long texts, {plans[0].found.amount.needles} hidden at each of "
        f"{', '.join(f'{place} %' for place in places)} of the text: share found / log P a token",
        ["plan", "dropped", *(f"{length:,} tokens" for length in lengths)],
        rows,
    )


def _found(rows: Sequence[Retrieval]) -> str:
    share = sum(row.found for row in rows) / len(rows)
    error = math.sqrt(sum(row.found_error**2 for row in rows)) / len(rows)
    logprob = sum(row.logprob for row in rows) / len(rows)
    return f"{_plus_minus(share, error)} / {logprob:.2f}"


def _following(plans: Sequence[Measured]) -> str:
    title = "Instructions followed (IFEval's strict checks, greedy answers)"
    rows, left_out = [], 0
    for plan in plans:
        for row in plan.found.following:
            left_out = row.left_out
            if row.dropped or plan is plans[0]:
                rows.append(
                    [
                        plan.name if row.dropped else "full model",
                        str(row.dropped),
                        _plus_minus(row.prompt_accuracy, row.prompt_error),
                        _plus_minus(row.instruction_accuracy, row.instruction_error),
                    ]
                )
    if not rows:
        return f"### {title}\n\nNot measured: the packages of `attndrop[evaluate]` were missing."
    judged = plans[0].found.following[0]
    headings = ["plan", "dropped", "prompts, all instructions", "instructions"]
    return (
        _table(title, headings, rows)
        + f"\n\n{judged.prompts} prompts with {judged.instructions} instructions; {left_out} "
        "prompts were left out, since what splits sentences for their checks was not there."
    )


def _making(plans: Sequence[Measured]) -> str:
    rows = []
    for plan in plans:
        deepest = max(plan.substitutes, default=0)
        parameters, size = plan.substitutes.get(deepest, (0, 0))
        cost = f"{parameters:,} / {size / 2**20:.1f} MiB at {deepest}" if parameters else "none"
        made = "made elsewhere" if plan.plan_seconds is None else f"{plan.plan_seconds:.1f} s"
        tokens = plan.plan.calibration
        rows.append(
            [
                plan.name,
                f"`{plan.plan.id}`",
                "" if tokens is None else f"{tokens.samples} x {tokens.length}",
                made,
                cost,
                f"{plan.evaluation_seconds:.0f} s",
            ]
        )
    return _table(
        "What making them took",
        ["plan", "id", "calibration tokens", "made in", "parameters of substitutes", "judged in"],
        rows,
    )


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"
