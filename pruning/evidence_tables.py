"""Evidence as tables for a terminal: one for each domain and for each kind of question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from pruning.evidence import Choices, Domain, Evaluation, Retrieval, TaskScore, average_choices


def tables(found: Evaluation) -> Iterator[Table]:
    """Yield a table for everything that was measured."""
    for domain in found.domains:
        yield _domain(found, domain)
    if found.health:
        yield _health(found)
    if found.choices:
        yield _choices(found)
    if found.following:
        yield _following(found)
    if found.retrieval:
        yield _retrieval(found)
    if found.tasks:
        yield _tasks(found)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=None, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _domain(found: Evaluation, domain: Domain) -> Table:
    return _table(
        f"{domain.name}: {domain.tokens:,} predicted tokens of {domain.source[:40]}",
        ("dropped", "ppl", "of full", "KL ± error", "p90", "p99", "agree ± error", "p10"),
        [
            (
                f"{row.dropped} of {found.layers}",
                f"{row.perplexity:.2f}",
                f"{row.perplexity_ratio:.3f}x",
                _plus_minus(row.kl, row.kl_error),
                f"{row.kl_p90:.2f}",
                f"{row.kl_p99:.2f}",
                _plus_minus(row.agreement, row.agreement_error),
                f"{row.agreement_p10:.3f}",
            )
            for row in found.figures
            if row.domain == domain.name
        ],
    )


def _health(found: Evaluation) -> Table:
    return _table(
        "answers that each wrote itself",
        ("dropped", "answers", "mean tokens", "repetition", "ended by themselves"),
        [
            (
                f"{row.dropped} of {found.layers}",
                str(row.answers),
                f"{row.mean_length:.1f} ± {row.mean_length_error:.1f}",
                f"{row.repetition:.3f} ± {row.repetition_error:.3f}",
                f"{row.finished:.0%} ± {row.finished_error:.0%}",
            )
            for row in found.health
        ],
    )


def _choices(found: Evaluation) -> Table:
    by_depth: dict[int, list[Choices]] = {}
    for row in found.choices:
        by_depth.setdefault(row.dropped, []).append(row)
    full = by_depth[0]
    rows = [
        [row[0].task, *(_plus_minus(each.accuracy, each.error) for each in row)]
        for row in zip(*by_depth.values(), strict=True)
    ]
    averages = [_plus_minus(*average_choices(each)) for each in by_depth.values()]
    unchanged = [sum(row.unchanged for row in each) / len(each) for each in by_depth.values()]
    return _table(
        "multiple choice, accuracy ± error",
        ("dropped", *map(str, by_depth)),
        [
            *rows,
            ["average", *averages],
            ["chosen as full", *(f"{each:.0%}" for each in unchanged)],
            ["questions", *[f"{sum(row.items for row in full):,}"] * len(by_depth)],
        ],
    )


def _following(found: Evaluation) -> Table:
    left_out = found.following[0].left_out
    return _table(
        f"instructions followed, {left_out} prompts left out" if left_out else "instructions",
        ("dropped", "prompts", "all of a prompt's", "instructions", "each"),
        [
            (
                f"{row.dropped} of {found.layers}",
                str(row.prompts),
                _plus_minus(row.prompt_accuracy, row.prompt_error),
                str(row.instructions),
                _plus_minus(row.instruction_accuracy, row.instruction_error),
            )
            for row in found.following
        ],
    )


def _retrieval(found: Evaluation) -> Table:
    cells: dict[tuple[int, int], dict[int, Retrieval]] = {}
    for row in found.retrieval:
        cells.setdefault((row.length, row.depth), {})[row.dropped] = row
    depths = dict.fromkeys(row.dropped for row in found.retrieval)
    return _table(
        f"sentences found, {found.amount.needles} in each place",
        ("tokens", "at", *(f"{depth} dropped" for depth in depths)),
        [
            (
                f"{length:,}",
                f"{place}%",
                *(_plus_minus(r.found, r.found_error) for r in each.values()),
            )
            for (length, place), each in cells.items()
        ],
    )


def _tasks(found: Evaluation) -> Table:
    rows: dict[tuple[str, str], list[TaskScore]] = {}
    for row in found.tasks:
        rows.setdefault((row.task, row.metric), []).append(row)
    depths = dict.fromkeys(row.dropped for row in found.tasks)
    return _table(
        f"tasks of lm-evaluation-harness {found.harness}",
        ("dropped", *map(str, depths)),
        [
            (f"{task} {metric}", *(_plus_minus(each.value, each.error or 0.0) for each in cells))
            for (task, metric), cells in rows.items()
        ],
    )


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"
