"""The page: what was measured on what, the figures, a table of them, and answers side by side.

One file that asks nothing of a network and runs no script; its policy says so to the browser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pruning.evidence import Answer, Example, average_choices
from pruning.report.markup import Markup, element, joined
from pruning.report.sections import chapters, section
from pruning.report.style import STYLE
from pruning.report.subject import Speed, Subject

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(subjects: Sequence[Subject], speeds: Sequence[Speed]) -> str:
    """Return the whole page. `subjects` holds at least one."""
    title = f"{subjects[0].found.model}: what dropping attention costs"
    head = joined(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    body = element(
        "main",
        element("h1", title),
        _facts(subjects, speeds),
        chapters(subjects, speeds),
        _answers(subjects),
        _table(subjects),
    )
    html = element("html", element("head", head), element("body", body), lang="en")
    return f"<!doctype html>\n{html}\n"


def _facts(subjects: Sequence[Subject], speeds: Sequence[Speed]) -> Markup:
    found = subjects[0].found
    software = found.versions
    facts = [
        ("Model", f"{found.model}, {found.layers} layers, {found.fingerprint[:19]}"),
        (
            "Computed",
            f"{found.dtype} on {found.device}, {found.created}, seed {found.amount.seed}",
        ),
        (
            "Software",
            f"attndrop {software.attndrop}, torch {software.torch}, transformers "
            f"{software.transformers}"
            + (f", lm-evaluation-harness {found.harness}" if found.harness else ""),
        ),
        *((f"Plan: {each.name}", _plan(each)) for each in subjects),
        *(
            (
                f"On {each.name}",
                f"{each.tokens:,} tokens in {each.samples} samples of {_short(each.source)}",
            )
            for each in found.domains
        ),
        *(("Speed", f"{each.title}; {each.device}") for each in speeds),
    ]
    pairs = [joined(element("dt", name), element("dd", fact)) for name, fact in facts]
    return element("dl", *pairs, class_="facts")


def _short(source: str) -> str:
    """Return a source's name and as much of its content's hash as a reader needs."""
    name, _, content = source.partition(" ")
    return f"{name} {content[:19]}".strip()


def _plan(subject: Subject) -> str:
    found = subject.found
    return found.plan + (f", substitutes {found.substitutes[:19]}" if found.substitutes else "")


def _answers(subjects: Sequence[Subject]) -> Markup | None:
    shown = [each for each in subjects if each.found.examples]
    if not shown:
        return None
    shown.sort(key=_farthest)
    count = min(len(each.found.examples) for each in shown)
    amount = shown[0].found.amount
    return section(
        "Answers side by side",
        f"Drawn at temperature 1, every depth with the same random numbers; at most "
        f"{amount.answer} tokens, cut here where long. Open is the plan that stays closest to the "
        "full model in conversation. An example shows what a difference looks "
        "like, not how often it occurs.",
        *(_example(shown, index) for index in range(count)),
    )


def _farthest(subject: Subject) -> float:
    """Return the highest KL of a plan's depths in conversation."""
    return max((row.kl for row in subject.rows("conversation")), default=math.inf)


def _example(subjects: Sequence[Subject], index: int) -> Markup:
    first, *others = [(each.name, each.found.examples[index]) for each in subjects]
    return element(
        "div",
        element("p", first[1].prompt, class_="prompt"),
        _side_by_side(*first, with_full=True),
        *(
            element(
                "details", element("summary", name), _side_by_side(name, example, with_full=False)
            )
            for name, example in others
        ),
    )


def _side_by_side(name: str, example: Example, *, with_full: bool) -> Markup:
    cards = [_answer(name, each) for each in example.answers if each.dropped or with_full]
    return element("div", *cards, class_="answers")


def _answer(name: str, answer: Answer) -> Markup:
    title = f"{name}, {answer.dropped} dropped" if answer.dropped else "full model"
    ending = None if answer.finished else element("small", " not ended")
    return element(
        "article",
        element("h3", title, ending),
        element("pre", answer.text or "(nothing)"),
        class_="answer" if answer.dropped else "answer full",
    )


_GROUPS = (("", 3), ("text", 3), ("conversation", 3), ("", 1), ("own answers", 2))
"""Headings above those of columns, each over so many."""
_DOMAIN_HEADINGS = ("perplexity", "KL", "agreement")
_HEADINGS = (
    "plan",
    "dropped",
    "KV of full",
    *_DOMAIN_HEADINGS,
    *_DOMAIN_HEADINGS,
    "multiple choice",
    "repeated",
    "ended",
)


def _table(subjects: Sequence[Subject]) -> Markup:
    rows = [
        element("tr", *_row(each, depth), class_="first" if number == 0 else None)
        for each in subjects
        for number, depth in enumerate(_depths(each))
    ]
    groups = [element("th", name, class_="group", colspan=span) for name, span in _GROUPS]
    headings = [
        element("th", name, class_="left" if place == 0 else None, scope="col")
        for place, name in enumerate(_HEADINGS)
    ]
    head = element("thead", element("tr", *groups), element("tr", *headings))
    return section(
        "The figures",
        "Perplexity is over the full model's; KL in nats a token; after ± one standard error. "
        "Repeated: share of four-token runs that an answer held before. Ended: share of answers "
        "that ended by themselves.",
        element("div", element("table", head, element("tbody", *rows)), class_="panel wide"),
    )


def _depths(subject: Subject) -> list[int]:
    found = subject.found
    depths = {row.dropped for row in found.figures} | {row.dropped for row in found.choices}
    return sorted(depths | {row.dropped for row in found.following})


def _row(subject: Subject, depth: int) -> list[Markup]:
    share = subject.kv_bytes(depth) / subject.kv_bytes(0)
    cells = [
        element("td", subject.name, class_="left"),
        element("td", str(depth)),
        element("td", f"{share:.0%}"),
    ]
    for domain in ("text", "conversation"):
        row = next((row for row in subject.rows(domain) if row.dropped == depth), None)
        if row is None:
            cells += [element("td")] * len(_DOMAIN_HEADINGS)
            continue
        cells += [
            _measured(row.perplexity_ratio, row.perplexity_ratio_error),
            _measured(row.kl, row.kl_error),
            _measured(row.agreement, row.agreement_error),
        ]
    choices = subject.choices().get(depth)
    cells.append(_measured(*average_choices(choices)) if choices else element("td"))
    health = next((row for row in subject.found.health if row.dropped == depth), None)
    if health is None:
        return [*cells, element("td"), element("td")]
    return [
        *cells,
        _measured(health.repetition, health.repetition_error),
        _measured(health.finished, health.finished_error),
    ]


def _measured(value: float, error: float) -> Markup:
    return element("td", f"{value:.3f}", element("small", f" ± {error:.3f}"))
