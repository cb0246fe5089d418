"""Swaps from a set: what they reach, what they are worth, and that they can be broken off."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from pruning import search as search_module
from pruning.calibration import silent
from pruning.plan import PlanError, plan_json, read_plan, write_plan
from pruning.plan_cache import PlanCache, PlanRequest, Wanted, compute_plan
from pruning.search import search
from pruning.selection import NoJournal, Ranking, Task, TriedSet, greedy
from pruning.substitutes import SubstituteKind
from pruning.trial import Trial
from tests.pruning.tiny_models import tiny_base, tiny_model
from tests.reference.divergence import cost
from tests.reference.silenced import silenced

LAYERS, DEPTH = 8, 3


def tokens(seed: int, samples: int) -> torch.Tensor:
    return torch.randint(4, 80, (samples, 16), generator=torch.Generator().manual_seed(seed))


CHOOSING = tokens(1, 6)
BASE = tiny_base(layers=LAYERS)


def task(**options) -> Task:
    return replace(
        Task(
            base=BASE,
            choosing=CHOOSING,
            held_out=CHOOSING,
            protected=frozenset(),
            depth=DEPTH,
            candidates=2,
            evaluations=500,
        ),
        **options,
    )


START = tuple(reversed(greedy(task(candidates=1), NoJournal(), silent).ranking))
"""A bad ranking, which leaves much to find."""


def test_every_set_costs_what_plain_transformers_say() -> None:
    plain = tiny_model(layers=LAYERS)
    trial = Trial(BASE, CHOOSING)
    for now in ((), (5, 6, 7), (2, 5, 7)):
        trial.become(now)
        sets = [(5, 6, 7), (1, 5, 7), (), (2, 5, 7), (3,)]
        for dropped, quality in zip(sets, trial.of_each(sets), strict=True):
            expected = cost(plain, silenced(plain, dropped), CHOOSING)
            assert quality.kl == pytest.approx(expected.kl, abs=2e-6)


def test_no_swap_improves_what_is_found_and_greedy_orders_it() -> None:
    found = search(task(start=START, candidates=LAYERS), NoJournal(), silent)
    layers = [step.layer for step in found.ranking]
    best = set(layers[:DEPTH])
    assert sorted(layers) == list(range(1, LAYERS))
    assert found.searched.found.kl < found.searched.greedy.kl
    trial = Trial(BASE, CHOOSING)
    (kl,) = (quality.kl for quality in trial.of_each([best]))
    assert found.ranking[DEPTH - 1].cost == pytest.approx(kl, abs=1e-6)
    swapped = [best - {o} | {i} for o, i in product(best, set(layers) - best)]
    assert min(quality.kl for quality in trial.of_each(swapped)) >= kl
    for depth, step in enumerate(found.ranking, start=1):
        (expected,) = trial.of_each([layers[:depth]])
        assert step.quality.kl == pytest.approx(expected.kl, abs=1e-6)
    rest = [step.layer for step in START if step.layer not in best]
    assert layers[DEPTH:] == rest


def test_where_nothing_better_is_found_the_ranking_is_greedys() -> None:
    found = search(task(start=START, evaluations=1), NoJournal(), silent)
    assert (found.ranking, found.searched.found) == (START, None)
    assert found.searched.tried == 1


def test_a_set_that_is_worse_on_held_out_tokens_is_not_taken() -> None:
    """It starts from the best set on the held-out tokens; few others call another one better."""
    best = search(task(start=START), NoJournal(), silent)
    mine, rest = ({step.layer for step in part} for part in (best.ranking[:DEPTH], best.ranking))
    swapped = [mine - {o} | {i} for o, i in product(mine, rest - mine)]

    def prefers_another(few: torch.Tensor) -> bool:
        own, *others = Trial(BASE, few).of_each([mine, *swapped])
        return min(quality.kl for quality in others) < own.kl

    few = next(few for seed in range(2, 99) if prefers_another(few := tokens(seed, 1)[:, :3]))
    found = search(task(start=best.ranking, choosing=few), NoJournal(), silent)
    assert (found.ranking, found.searched.found) == (best.ranking, None)
    assert found.searched.greedy == best.searched.found


class InterruptedSearchError(Exception):
    pass


class Journal(NoJournal):
    """Breaks the search off after some sets, and later after some steps."""

    def __init__(self) -> None:
        self.tried: tuple[TriedSet, ...] = ()
        self.steps: Ranking = ()

    def load(self) -> Ranking:
        return self.steps

    def save(self, steps: Ranking) -> None:
        self.steps = steps
        if len(steps) == 2:
            raise InterruptedSearchError

    def load_tried(self) -> tuple[TriedSet, ...]:
        return self.tried

    def save_tried(self, tried: tuple[TriedSet, ...]) -> None:
        was_early, self.tried = len(self.tried) < 5, tried
        if was_early and len(tried) >= 5:
            raise InterruptedSearchError


def test_a_search_that_was_broken_off_goes_on_to_the_same_end(monkeypatch) -> None:
    whole = search(task(start=START), NoJournal(), silent)
    journal = Journal()
    for _ in range(2):
        with pytest.raises(InterruptedSearchError):
            search(task(start=START), journal, silent)
    measured: list[int] = []

    class Counted(Trial):
        def of_each(self, sets):
            measured.append(len(sets))
            return super().of_each(sets)

    monkeypatch.setattr(search_module, "Trial", Counted)
    resumed = search(task(start=START), journal, silent)
    assert (resumed.ranking, resumed.searched) == (whole.ranking, whole.searched)
    assert measured == [2], "only the two sets to judge on held-out tokens"


REQUEST = PlanRequest(strategy="search", samples=4, length=12, evaluations=30)


class TestPlan:
    @pytest.fixture
    def cache(self, tmp_path) -> PlanCache:
        return PlanCache(tmp_path / "plans")

    def test_starts_from_the_cached_greedy_plan_and_says_what_it_gained(self, cache, tmp_path):
        wanted = Wanted(("3",))
        start, _ = cache.load_or_compute(BASE, replace(REQUEST, strategy="greedy"))
        seen: set[str] = set()
        plan, origin = cache.load_or_compute(BASE, REQUEST, lambda what, *_: seen.add(what), wanted)
        assert (origin, plan.strategy, plan.searched.depth) == ("computed", "search", 3)
        assert "swapping layers" in seen
        assert "choosing layers" not in seen
        if plan.searched.found is None:
            assert plan.ranking == start.ranking
        else:
            assert plan.quality(3).kl == pytest.approx(plan.searched.found.kl, abs=1e-6)
        assert plan.searched.greedy.kl == pytest.approx(start.quality(3).kl, abs=1e-6)
        assert cache.load_or_compute(BASE, REQUEST, wanted=wanted) == (plan, "cached")
        assert not list(cache.folder.glob("*.partial"))
        path = tmp_path / "plan.json"
        write_plan(path, plan)
        assert read_plan(path) == plan
        for other in ({"evaluations": 31}, {"seed": 1}):
            again = cache.load_or_compute(BASE, replace(REQUEST, **other), wanted=wanted)
            assert again[1] == "computed"
        assert cache.load_or_compute(BASE, REQUEST, wanted=Wanted(("2",)))[1] == "computed"

    def test_what_cannot_be_searched_for(self, cache):
        with pytest.raises(PlanError, match=r"for one depth, 1 to 6 of tiny, not 0"):
            compute_plan(BASE, REQUEST)
        with pytest.raises(PlanError, match="not 7"):
            cache.load_or_compute(BASE, REQUEST, wanted=Wanted(("7",)))
        with pytest.raises(PlanError, match="--evaluations must be at least 1"):
            replace(REQUEST, evaluations=0)
        with pytest.raises(PlanError, match="attndrop heal"):
            replace(REQUEST, substitutes=SubstituteKind(None))

    def test_what_it_says_must_be_possible(self, tmp_path):
        plan, _ = compute_plan(BASE, replace(REQUEST, depth=2, evaluations=3))
        path = tmp_path / "plan.json"
        path.write_text(plan_json(plan).replace('"depth": 2', '"depth": 9'))
        with pytest.raises(PlanError, match="it was searched for 9 dropped layers"):
            read_plan(path)
