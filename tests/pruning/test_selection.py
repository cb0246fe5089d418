"""Rankings: the paper's one-shot rule, and what never appears in one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.calibration import CalibrationSet, silent
from pruning.importance import measure_importance
from pruning.selection import STRATEGIES, DropStep, rank_by_importance
from tests.pruning.tiny_models import tiny_base


def test_least_important_first_and_ties_by_lower_layer():
    ranking = rank_by_importance([0.0, 0.3, 0.1, 0.2, 0.1], frozenset())
    assert ranking == (DropStep(2, 0.1), DropStep(4, 0.1), DropStep(3, 0.2), DropStep(1, 0.3))


def test_protected_layers_and_layer_0_never_appear():
    ranking = rank_by_importance([0.0, 0.3, 0.1, 0.2], frozenset({2}))
    assert [step.layer for step in ranking] == [3, 1]


@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=40),
    st.frozensets(st.integers(0, 39), max_size=10),
)
def test_a_ranking_holds_every_other_layer_once_at_rising_cost(importance, protected):
    ranking = rank_by_importance(importance, protected)
    layers = [step.layer for step in ranking]
    assert sorted(layers) == sorted(set(range(1, len(importance))) - protected)
    costs = [step.cost for step in ranking]
    assert costs == sorted(costs)
    assert all(step.cost == importance[step.layer] for step in ranking)


def test_the_cosine_strategy_ranks_by_the_measured_importance():
    base = tiny_base()
    data = CalibrationSet(torch.arange(4, 24).reshape(2, 10), "counting", None)
    ranking = STRATEGIES["cosine"](base, data, frozenset({2}), silent)
    assert ranking == rank_by_importance(measure_importance(base, data), frozenset({2}))
