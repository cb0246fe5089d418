"""Rankings: the paper's one-shot rule, the greedy search, and what never appears in either."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.calibration import silent
from pruning.importance import measure_importance
from pruning.selection import (
    DropStep,
    NoJournal,
    Ranking,
    Selection,
    Task,
    cosine,
    greedy,
    rank_by_importance,
)
from pruning.substitutes import SubstituteKind
from tests.pruning.tiny_models import tiny_base, tiny_model
from tests.reference.divergence import cost, greedy_order, substituted
from tests.reference.silenced import silenced

LAYERS = 5


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


def tokens(seed: int, samples: int) -> torch.Tensor:
    return torch.randint(4, 80, (samples, 16), generator=torch.Generator().manual_seed(seed))


CHOOSING, HELD_OUT = tokens(1, 10), tokens(2, 3)


def task(family: str = "llama", protected: frozenset[int] = frozenset(), **options) -> Task:
    base = tiny_base(family, layers=LAYERS)
    return Task(base=base, choosing=CHOOSING, held_out=HELD_OUT, protected=protected, **options)


def test_cosine_ranks_by_the_importance_of_the_tokens_to_choose_by():
    found = cosine(task(protected=frozenset({2})), NoJournal(), silent)
    importance = measure_importance(tiny_base(layers=LAYERS), CHOOSING)
    assert found.ranking == rank_by_importance(importance, frozenset({2}))
    assert found.held_out is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite", "phi3", "qwen3"])
def test_greedy_equals_trying_everything_anew(family):
    found = greedy(task(family, candidates=LAYERS), NoJournal(), silent)
    plain = tiny_model(family, layers=LAYERS)
    expected = greedy_order(plain, CHOOSING, range(1, LAYERS))
    assert [step.layer for step in found.ranking] == [layer for layer, _ in expected]
    for depth, (step, (_, kl)) in enumerate(zip(found.ranking, expected, strict=True), start=1):
        assert step.cost == pytest.approx(kl, abs=2e-6)
        dropped = [each.layer for each in found.ranking[:depth]]
        judged = cost(plain, silenced(plain, dropped), HELD_OUT)
        assert step.quality.kl == pytest.approx(judged.kl, abs=2e-6)
        assert step.quality.agreement == judged.agreement
        assert step.quality.perplexity == pytest.approx(judged.perplexity, rel=1e-5)


def test_one_candidate_is_the_order_of_importance():
    found = greedy(task(candidates=1), NoJournal(), silent)
    order = rank_by_importance(measure_importance(tiny_base(layers=LAYERS), CHOOSING), frozenset())
    assert [step.layer for step in found.ranking] == [step.layer for step in order]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite"])
def test_quality_with_substitutes_equals_plain_transformers_with_them_in_place(family):
    found = greedy(task(family, substitutes=SubstituteKind(None)), NoJournal(), silent)
    plain = tiny_model(family, layers=LAYERS)
    maps = {}
    for step in found.ranking:
        each = found.substitutes.by_layer[step.layer]
        maps[step.layer] = (each.weight, each.bias)
        judged = cost(plain, substituted(plain, maps), HELD_OUT)
        assert step.quality.kl == pytest.approx(judged.kl, abs=1e-5)
        assert step.quality.agreement == judged.agreement


class InterruptedSearchError(Exception):
    pass


class Journal:
    """Breaks the search off after some steps."""

    def __init__(self, after: int) -> None:
        self.steps: Ranking = ()
        self.after = after

    def load(self) -> Ranking:
        return self.steps

    def save(self, steps: Ranking) -> None:
        self.steps = steps
        if len(steps) == self.after:
            raise InterruptedSearchError


@pytest.mark.parametrize("kind", [None, SubstituteKind(None), SubstituteKind(4)], ids=str)
def test_a_search_that_was_broken_off_goes_on_to_the_same_end(kind):
    whole = greedy(task(substitutes=kind), NoJournal(), silent)
    journal = Journal(after=2)
    with pytest.raises(InterruptedSearchError):
        greedy(task(substitutes=kind), journal, silent)
    seen: list[int] = []
    resumed: Selection = greedy(
        task(substitutes=kind),
        journal,
        lambda what, done, total: seen.append(done) if what == "choosing layers" else None,
    )
    assert resumed.ranking == whole.ranking
    assert seen == [3, 4], "what was found before is not searched for again"
    if kind is not None:
        assert resumed.substitutes.fingerprint == whole.substitutes.fingerprint
