"""The report's figures: each a function from subjects to a section, or nothing where nothing was
measured. Captions say what was measured and how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from pruning.evidence import Figures, average_choices
from pruning.report.markup import Child, Markup, element, joined
from pruning.report.plot import Axes, Cell, Point, Series, grid, legend, line_plot
from pruning.report.subject import Speed, Subject
from pruning.targets import ATTENTION

DROPPED = "attention sublayers dropped"
_DOMAINS = {"text": "text", "conversation": "conversation"}


def section(title: str, caption: str, *content: Child) -> Markup:
    return element("section", element("h2", title), element("p", caption, class_="soft"), *content)


def panels(*figures: Markup) -> Markup:
    return element("div", *figures, class_="panels")


def panel(title: str, plot: Markup, note: str = "") -> Markup:
    caption = element("figcaption", note) if note else None
    return element("figure", element("h3", title), plot, caption, class_="panel")


def importance(subjects: Sequence[Subject]) -> Markup | None:
    """Show in which order each plan drops layers, and what a layer is worth where it was scored."""
    planned = [
        (each, each.plan)
        for each in subjects
        if each.plan is not None and each.plan.target == ATTENTION
    ]
    if not planned:
        return None
    layers = planned[0][1].model.layers
    rows: list[tuple[str, Sequence[Cell]]] = []
    for subject, plan in planned:
        places = {step.layer: place for place, step in enumerate(plan.ranking, start=1)}
        rows.append((subject.name, [_order(n, places, len(places)) for n in range(layers)]))
        if plan.strategy == "cosine":
            costs = {step.layer: step.cost for step in plan.ranking if step.cost is not None}
            highest = max(costs.values(), default=0.0)
            rows.append(("importance", [_worth(n, costs.get(n), highest) for n in range(layers)]))
    return section(
        "Which layers go first",
        "Order in which each plan drops the attention of its layers: 1, with the strongest shade, "
        "goes first. Empty cells are always kept. Where a plan is by cosine, the row below it "
        "shades importance, 1 - cos(X, X + Attn(norm(X))): how far the sublayer turns the residual "
        "stream.",
        element(
            "figure",
            grid(list(map(str, range(layers))), rows, "layer", margin=150),
            class_="panel wide",
        ),
    )


def _order(layer: int, places: Mapping[int, int], most: int) -> Cell:
    if layer not in places:
        return Cell("", f"layer {layer}: kept", None)
    place = places[layer]
    return Cell(str(place), f"layer {layer}: dropped as number {place}", 1 - (place - 1) / most)


def _worth(layer: int, cost: float | None, highest: float) -> Cell:
    if cost is None:
        return Cell("", f"layer {layer}: not scored", None)
    share = cost / highest if highest > 0 else 0.0
    shade = math.sqrt(max(0.0, min(1.0, share)))  # most layers are far below the highest
    return Cell("", f"layer {layer}: importance {cost:.5f}", shade)


def quality(subjects: Sequence[Subject]) -> Markup | None:
    """Show KL, agreement and perplexity against layers dropped, on each domain."""
    figures = []
    for domain, shown in _DOMAINS.items():
        measured = [each for each in subjects if each.rows(domain)]
        for measure in _MEASURES if measured else ():
            series = [measure.series(each, domain) for each in measured]
            axes = Axes(DROPPED, measure.axis, measure.logarithmic, measure.y_range)
            figures.append(panel(f"{measure.name}, {shown}", line_plot(series, axes)))
    if not figures:
        return None
    return section(
        "Quality against layers dropped",
        "Against the full model on the same tokens. Text is read in windows; conversation is "
        "teacher-forced over answers that the full model wrote to chat prompts. Bars are one "
        "standard error over windows or conversations.",
        _names(subjects),
        panels(*figures),
    )


class _Measure:
    """One of the figures that a depth has on a domain."""

    def __init__(
        self,
        name: str,
        axis: str,
        value: Callable[[Figures], tuple[float, float]],
        *,
        logarithmic: bool = False,
        y_range: tuple[float, float] | None = None,
    ) -> None:
        self.name, self.axis, self._value = name, axis, value
        self.logarithmic, self.y_range = logarithmic, y_range

    def series(self, subject: Subject, domain: str) -> Series:
        return Series(subject.name, subject.look, tuple(map(self._point, subject.rows(domain))))

    def _point(self, row: Figures) -> Point:
        value, error = self._value(row)
        title = f"{row.dropped} dropped, {self.name} {value:.3f} ± {error:.3f}"
        return Point(row.dropped, value, title, error)


_MEASURES = (
    _Measure("KL", "KL(full || pruned), nats a token", lambda row: (row.kl, row.kl_error)),
    _Measure(
        "agreement",
        "same most likely token, share",
        lambda row: (row.agreement, row.agreement_error),
        y_range=(0.0, 1.0),
    ),
    _Measure(
        "perplexity",
        "perplexity over full's",
        lambda row: (row.perplexity_ratio, row.perplexity_ratio_error),
        logarithmic=True,
    ),
)


def departures(subjects: Sequence[Subject]) -> Markup | None:
    """Show what multiple choice sees beside what text and conversation see, plan by plan."""
    figures = [
        panel(each.name, line_plot(lines, Axes(DROPPED, "share of full")))
        for each in subjects
        if len(lines := _shares(each)) > 1
    ]
    if not figures:
        return None
    return section(
        "Where conversation departs from multiple choice",
        "Accuracy is over the full model's, averaged over tasks. It may stay level while the "
        "choices themselves change, and while one token in a few is no longer what the full model "
        "would write: an average of right answers does not see what a reader does.",
        legend([(name, look) for look, name in enumerate(_SHARES)]),
        panels(*figures),
    )


_SHARES = (
    "multiple choice: accuracy over full's",
    "multiple choice: same choice as full",
    "text: same token as full",
    "conversation: same token as full",
)


def _shares(subject: Subject) -> list[Series]:
    lines: list[tuple[int, list[Point]]] = []
    if choices := subject.choices():
        full, _ = average_choices(choices[0])
        accuracy, same = [], []
        for depth, rows in choices.items():
            value, error = average_choices(rows)
            title = f"{depth} dropped, accuracy {value:.3f} ± {error:.3f}"
            accuracy.append(Point(depth, value / full, title, error / full))
            unchanged = sum(row.unchanged for row in rows) / len(rows)
            same.append(Point(depth, unchanged, f"{depth} dropped, {unchanged:.1%} unchanged"))
        lines += [(0, accuracy), (1, same)] if full else []
    for look, domain in enumerate(_DOMAINS, start=2):
        points = [
            Point(
                r.dropped, r.agreement, f"{r.dropped} dropped, {r.agreement:.3f}", r.agreement_error
            )
            for r in subject.rows(domain)
        ]
        lines += [(look, points)] if points else []
    return [Series(_SHARES[look], look, tuple(points)) for look, points in lines]


def questions(subjects: Sequence[Subject]) -> Markup | None:
    """Show multiple choice, task by task."""
    asked = [each for each in subjects if each.found.choices]
    if not asked:
        return None
    tasks = list(dict.fromkeys(row.task for each in asked for row in each.found.choices))
    figures = [panel("average of the tasks", line_plot(list(map(_average, asked)), _ACCURACY))]
    for task in tasks:
        series = [_task(each, task) for each in asked]
        figures.append(panel(task, line_plot([s for s in series if s.points], _ACCURACY)))
    items = sum(row.items for row in asked[0].found.choices if row.dropped == 0)
    return section(
        "Multiple choice",
        f"{items:,} questions. The answer is the choice with the most log-probability a character. "
        "Bars are one standard error.",
        _names(asked),
        panels(*figures),
    )


_ACCURACY = Axes(DROPPED, "accuracy")


def _average(subject: Subject) -> Series:
    choices = subject.choices().items()
    return _shown(subject, [(depth, *average_choices(rows)) for depth, rows in choices])


def _task(subject: Subject, task: str) -> Series:
    rows = [row for row in subject.found.choices if row.task == task]
    return _shown(subject, [(row.dropped, row.accuracy, row.error) for row in rows])


def _shown(subject: Subject, values: Sequence[tuple[int, float, float]]) -> Series:
    """Return depths, values and their errors as a series."""
    points = [
        Point(depth, value, f"{depth} dropped, {value:.3f} ± {error:.3f}", error)
        for depth, value, error in values
    ]
    return Series(subject.name, subject.look, tuple(points))


def costs(subjects: Sequence[Subject], speeds: Sequence[Speed]) -> Markup | None:
    """Show what is won for the quality that is lost."""
    domain = "conversation" if any(each.rows("conversation") for each in subjects) else "text"
    measured = [each for each in subjects if each.rows(domain)]
    if not measured:
        return None
    memory = [
        Series(each.name, each.look, tuple(_kept(each, row) for row in each.rows(domain)))
        for each in measured
    ]
    agreement = f"agreement on {domain}"
    figures = [
        panel(
            "KV memory",
            line_plot(
                memory,
                Axes("KV cache, KiB a token", agreement, y_range=(0.0, 1.0), x_from_zero=False),
            ),
            f"Counted from the model's shape in {measured[0].found.dtype}.",
        )
    ]
    for speed in speeds:
        lines = [line for each in measured if (line := _fast(each, domain, speed)).points]
        if lines:
            axes = Axes("tokens a second", agreement, y_range=(0.0, 1.0), x_from_zero=False)
            figures.append(panel("speed", line_plot(lines, axes), f"{speed.title}"))
    return section(
        "Memory and speed against quality",
        "Each mark is a depth; the full model is at agreement 1. Further up is closer to the full "
        "model; further left, less memory; further right, more speed.",
        _names(measured),
        panels(*figures),
    )


def _kept(subject: Subject, row: Figures) -> Point:
    size = subject.kv_bytes(row.dropped) / 1024
    title = f"{row.dropped} dropped, {size:,.1f} KiB a token, agreement {row.agreement:.3f}"
    return Point(size, row.agreement, title, row.agreement_error)


def _fast(subject: Subject, domain: str, speed: Speed) -> Series:
    by_depth = {row.dropped: row for row in subject.rows(domain)}
    points = [
        Point(
            row.tokens_per_second,
            by_depth[row.dropped].agreement,
            f"{row.dropped} dropped, {row.tokens_per_second:,.0f} tokens/s, {row.in_flight} at "
            f"once, agreement {by_depth[row.dropped].agreement:.3f}",
            by_depth[row.dropped].agreement_error,
        )
        for row in speed.rows
        if row.dropped in by_depth
    ]
    return Series(subject.name, subject.look, tuple(points))


def retrieval(subjects: Sequence[Subject]) -> Markup | None:
    """Show where hidden sentences are found."""
    figures = [
        panel(f"{each.name}: {depth} dropped" if depth else "full model", _found(each, depth))
        for number, each in enumerate(subjects)
        for depth in sorted({row.dropped for row in each.found.retrieval})
        if depth or number == 0
    ]
    if not figures:
        return None
    return section(
        "Retrieval from long text",
        "A sentence with a made-up name and number is hidden at a place in text, and asked for at "
        "the end. Cells: in how many trials, in %, greedy decoding would write the number.",
        element("div", *figures, class_="panels small"),
    )


def _found(subject: Subject, depth: int) -> Markup:
    rows = [row for row in subject.found.retrieval if row.dropped == depth]
    places = sorted({row.depth for row in rows})
    by_place = {(row.length, row.depth): row for row in rows}
    lines: list[tuple[str, Sequence[Cell]]] = []
    for length in sorted({row.length for row in rows}):
        cells = []
        for place in places:
            row = by_place.get((length, place))
            if row is None:
                cells.append(Cell("", "not measured", None))
                continue
            title = (
                f"{length:,} tokens, at {place} %: found {row.found:.2f} ± {row.found_error:.2f} "
                f"of {row.trials}; log P {row.logprob:.2f} a token"
            )
            cells.append(Cell(f"{row.found:.0%}".removesuffix("%"), title, row.found))
        lines.append((f"{length:,} tokens", cells))
    return grid([str(each) for each in places], lines, "place in the text, %", margin=90, side=42)


def following(subjects: Sequence[Subject]) -> Markup | None:
    """Show whether instructions are followed."""
    checked = [each for each in subjects if each.found.following]
    if not checked:
        return None
    first = checked[0].found.following[0]
    prompts = [
        _shown(each, [(r.dropped, r.prompt_accuracy, r.prompt_error) for r in each.found.following])
        for each in checked
    ]
    instructions = [
        _shown(
            each,
            [
                (r.dropped, r.instruction_accuracy, r.instruction_error)
                for r in each.found.following
            ],
        )
        for each in checked
    ]
    left_out = (
        f" Left out: {first.left_out}, whose checks need data that was not there."
        if first.left_out
        else ""
    )
    axes = Axes(DROPPED, "share followed")
    return section(
        "Instructions followed",
        f"IFEval's strict checks on greedy answers to {first.prompts} prompts with "
        f"{first.instructions} instructions.{left_out} Bars are one standard error.",
        _names(checked),
        panels(
            panel("prompts, all of whose instructions are followed", line_plot(prompts, axes)),
            panel("instructions", line_plot(instructions, axes)),
        ),
    )


def _names(subjects: Sequence[Subject]) -> Markup:
    return legend([(each.name, each.look) for each in subjects])


def chapters(subjects: Sequence[Subject], speeds: Sequence[Speed]) -> Markup:
    """Return all sections for which something was measured."""
    return joined(
        importance(subjects),
        quality(subjects),
        departures(subjects),
        costs(subjects, speeds),
        questions(subjects),
        following(subjects),
        retrieval(subjects),
    )
