"""Budgets: which depth they choose, when a curve is long enough, and which of them are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.budget import DEFAULT_BUDGET, Budget, BudgetError, chosen
from pruning.divergence import Quality


def curve(*kls: float) -> list[Quality]:
    """Qualities of a full perplexity of 10 that get worse with the KL in every way."""
    return [Quality(kl, 1 - kl, 10 * (1 + kl)) for kl in kls]


@pytest.mark.parametrize(
    "budget",
    [Budget(max_kl=0.2), Budget(min_agreement=0.8), Budget(max_perplexity_ratio=1.2)],
    ids=str,
)
def test_each_limit_chooses_the_deepest_inside(budget: Budget) -> None:
    assert budget.deepest(curve(0.05, 0.1, 0.15, 0.3, 0.4, 0.5), 10.0) == 3
    assert budget.deepest(curve(0.3, 0.4), 10.0) == 0
    assert budget.deepest(curve(0.1, 0.3, 0.15, 0.3), 10.0) == 3, "a dent is passed"


def test_all_limits_must_hold() -> None:
    measured = curve(0.05, 0.1, 0.15)
    assert Budget(max_kl=0.2, min_agreement=0.88).deepest(measured, 10.0) == 2
    assert Budget(max_kl=0.2, max_perplexity_ratio=1.07).deepest(measured, 10.0) == 1


@given(st.lists(st.floats(0.01, 1.0), max_size=12), st.integers(0, 12))
def test_what_was_measured_beyond_the_answer_does_not_matter(kls, known) -> None:
    budget, whole = Budget(max_kl=0.5), curve(*kls)
    beginning = [q if depth < known else None for depth, q in enumerate(whole)]
    assert budget.deepest(beginning, 10.0) in (None, budget.deepest(whole, 10.0))
    assert budget.deepest(whole, 10.0) is not None


def test_patience_is_counted_in_a_row() -> None:
    assert Budget(max_kl=0.2).deepest([*curve(0.3, 0.1, 0.3), None], 10.0) is None
    assert Budget(max_kl=0.2).deepest([*curve(0.1, 0.3, 0.3), None], 10.0) == 1
    assert Budget(max_kl=0.2).deepest(curve(0.1, 0.3, 0.3, 0.1), 10.0) == 1


def test_no_more_depths_are_asked_for_than_can_be_needed() -> None:
    budget = Budget(max_kl=0.2)
    assert budget.depths_needed([None, None, None], 10.0) == 2
    assert budget.depths_needed([*curve(0.1, 0.3), None], 10.0) == 1
    assert budget.depths_needed([*curve(0.3, 0.3), None], 10.0) == 0


def test_options_together() -> None:
    assert chosen(None, None, None, None) is None
    assert chosen("auto", None, None, None) == DEFAULT_BUDGET
    assert chosen("8", None, None, None) == "8"
    assert chosen(None, 0.1, None, None) == chosen("auto", 0.1, None, None) == Budget(max_kl=0.1)
    with pytest.raises(BudgetError, match=r"--drop 8 says how many .* \(agreement at least 0.9\)"):
        chosen("8", None, 0.9, None)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "a budget needs --max-kl"),
        ({"max_kl": 0.0}, "--max-kl must be above 0"),
        ({"max_kl": float("nan")}, "--max-kl must be above 0"),
        ({"min_agreement": 1.0}, "--min-agreement must be between 0 and 1"),
        ({"max_perplexity_ratio": 1.0}, "--max-perplexity-ratio must be above 1"),
        ({"max_perplexity_ratio": float("inf")}, "--max-perplexity-ratio must be above 1"),
    ],
)
def test_limits_that_can_never_or_will_always_hold(limits, message) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**limits)
