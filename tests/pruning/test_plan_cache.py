"""The cache of plans: what is measured once, what is measured again, and what is said of it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pruning import plan_cache as plan_cache_module
from pruning.budget import Budget
from pruning.calibration import CalibrationError, CalibrationSet, mixture
from pruning.plan import Plan, PlanError, read_plan, write_plan
from pruning.plan_cache import PlanCache, PlanRequest, Wanted, compute_plan
from pruning.substitutes import SubstituteKind
from pruning.trial import Trial
from tests.pruning.tiny_models import tiny_base

BASE = tiny_base(layers=6)
REQUEST = PlanRequest(samples=2, length=12, protected=frozenset({3}))


class TestRequest:
    def test_unknown_strategy(self):
        with pytest.raises(PlanError, match="strategy 'best' is not one of cosine, greedy, search"):
            PlanRequest(strategy="best")

    def test_options_that_the_strategy_cannot_use(self):
        with pytest.raises(PlanError, match="add --strategy greedy"):
            PlanRequest(substitutes=SubstituteKind(None))
        with pytest.raises(PlanError, match="--candidates must be at least 1"):
            PlanRequest(strategy="greedy", candidates=0)

    def test_protected_layers_must_exist(self):
        with pytest.raises(PlanError, match=r"protected layers \[6\] do not exist"):
            compute_plan(BASE, replace(REQUEST, protected=frozenset({6})))


def entry(cache: PlanCache) -> Path:
    (path,) = cache.folder.glob("*.json")
    return path


class TestCache:
    @pytest.fixture
    def cache(self, tmp_path) -> PlanCache:
        return PlanCache(tmp_path / "cache" / "plans")

    def test_measures_once(self, cache):
        first, origin = cache.load_or_compute(BASE, REQUEST)
        again, later = cache.load_or_compute(BASE, REQUEST)
        assert (origin, later) == ("computed", "cached")
        assert again == first

    @pytest.mark.parametrize(
        "other",
        [{"samples": 3}, {"length": 13}, {"seed": 1}, {"protected": frozenset({2})}],
    )
    def test_every_part_of_the_question_counts(self, cache, other):
        cache.load_or_compute(BASE, REQUEST)
        assert cache.load_or_compute(BASE, replace(REQUEST, **other))[1] == "computed"

    def test_another_model_or_dtype_is_another_question(self, cache):
        cache.load_or_compute(BASE, REQUEST)
        assert cache.load_or_compute(tiny_base(layers=6, seed=1), REQUEST)[1] == "computed"
        low = tiny_base(layers=6)
        low.model.bfloat16()
        assert cache.load_or_compute(low, REQUEST)[1] == "computed"

    def test_a_changed_file_is_another_question_but_a_seed_is_not(self, cache, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("some text " * 10)
        request = replace(REQUEST, calibration=(str(path),))
        assert cache.load_or_compute(BASE, request)[1] == "computed"
        assert cache.load_or_compute(BASE, replace(request, seed=7))[1] == "cached"
        path.write_text("other text " * 10)
        assert cache.load_or_compute(BASE, request)[1] == "computed"

    def test_a_damaged_entry_is_measured_again_with_a_warning(self, cache, caplog):
        plan, _ = cache.load_or_compute(BASE, REQUEST)
        entry(cache).write_text("{")
        with caplog.at_level(logging.WARNING):
            again, origin = cache.load_or_compute(BASE, REQUEST)
        assert (again.id, origin) == (plan.id, "computed")
        assert "measuring again" in caplog.text
        assert read_plan(entry(cache)) == again

    @pytest.mark.parametrize(
        ("base", "request_", "reason"),
        [
            (tiny_base(layers=6, seed=1), REQUEST, "made for the weights of"),
            (BASE, replace(REQUEST, seed=4), "made with another seed"),
        ],
    )
    def test_a_foreign_entry_is_measured_again(self, cache, caplog, base, request_, reason):
        plan, _ = cache.load_or_compute(BASE, REQUEST)
        write_plan(entry(cache), compute_plan(base, request_)[0])
        with caplog.at_level(logging.WARNING):
            again, origin = cache.load_or_compute(BASE, REQUEST)
        assert (again.id, origin) == (plan.id, "computed")
        assert reason in caplog.text

    def test_an_entry_that_cannot_be_read_is_one_sentence(self, cache):
        cache.load_or_compute(BASE, REQUEST)
        path = entry(cache)
        path.unlink()
        path.mkdir()
        with pytest.raises(PlanError, match=r"cannot read plan .* check the file's permissions"):
            cache.load_or_compute(BASE, REQUEST)

    def test_a_folder_that_cannot_be_made_is_one_sentence_before_measuring(
        self, tmp_path, monkeypatch
    ):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(
            plan_cache_module, "mixture", lambda *_, **__: pytest.fail("measured first")
        )
        with pytest.raises(PlanError, match="set ATTNDROP_CACHE_DIR"):
            PlanCache(tmp_path / "file" / "plans").load_or_compute(BASE, REQUEST)

    def test_errors_in_the_data_come_through(self, cache):
        with pytest.raises(CalibrationError, match="there is no calibration file"):
            cache.load_or_compute(BASE, replace(REQUEST, calibration=("none.txt",)))

    def test_latest(self, cache, caplog):
        with pytest.raises(PlanError, match="compute one with `attndrop plan --model tiny`"):
            cache.latest("tiny")
        plan, _ = cache.load_or_compute(BASE, REQUEST)
        (cache.folder / "damaged.json").write_text("{")
        newer = replace(plan, created="2999-01-01T00:00:00Z", dtype="bfloat16")
        write_plan(cache.folder / "newer.json", newer)
        assert cache.latest("tiny") == newer
        assert "skipped: plan" in caplog.text


def one_depth(plan, depth):
    """What judging from the beginning says of one depth."""
    table = mixture(("self",), BASE, samples=REQUEST.samples, length=REQUEST.length)
    trial = Trial(BASE, table.split()[1])
    trial.drop(dict.fromkeys(plan.dropped_layers(depth)))
    return trial.quality()


class TestQuality:
    @pytest.fixture
    def cache(self, tmp_path) -> PlanCache:
        return PlanCache(tmp_path / "plans")

    def test_only_the_wanted_depths_are_measured_and_they_are_kept(self, cache):
        plan, _ = cache.load_or_compute(BASE, REQUEST, wanted=Wanted(("1", "50%")))
        assert [quality is not None for quality in plan.curve] == [True, False, True, False]
        for depth in (1, 3):
            assert plan.quality(depth) == one_depth(plan, depth)
        assert read_plan(entry(cache)) == plan
        more, origin = cache.load_or_compute(BASE, REQUEST, wanted=Wanted(("2",)))
        assert origin == "cached"
        assert more.id == plan.id
        assert more.quality(2) == one_depth(plan, 2)
        assert more.quality(3) == plan.quality(3)

    def test_calibration_tokens_are_made_once_even_for_several_rankings(
        self, cache, monkeypatch, caplog
    ):
        made: list[int] = []

        def counted(*arguments: object, **options: object) -> CalibrationSet:
            made.append(1)
            return mixture(*arguments, **options)

        monkeypatch.setattr(plan_cache_module, "mixture", counted)
        first, _ = cache.load_or_compute(BASE, REQUEST)
        other, _ = cache.load_or_compute(BASE, replace(REQUEST, protected=frozenset({2})))
        assert other.calibration == first.calibration
        assert len(made) == 1
        (path,) = cache.folder.glob("*.tokens")
        for damaged in (b"", save({"token_ids": torch.full((2, 12), 10**6)}), save({})):
            path.write_bytes(damaged)
            cache.load_or_compute(BASE, REQUEST, wanted=Wanted((str(len(made)),)))
        assert len(made) == 4
        assert caplog.text.count("making calibration tokens again") == 3
        cache.compute(BASE, REQUEST)
        assert len(made) == 5, "measuring again means from the beginning"

    def test_what_is_known_is_not_measured_again(self, cache, monkeypatch):
        wanted = Wanted(("1",), Budget(max_kl=1e-6))
        plan, _ = cache.load_or_compute(BASE, REQUEST, wanted=wanted)
        monkeypatch.setattr(plan_cache_module, "mixture", lambda *_, **__: pytest.fail("again"))
        assert cache.load_or_compute(BASE, REQUEST, wanted=wanted) == (plan, "cached")

    def test_a_budget_measures_as_deep_as_it_needs(self, cache):
        narrow, wide = Budget(max_kl=1e-6), Budget(max_kl=100.0)
        plan, _ = cache.load_or_compute(BASE, REQUEST, wanted=Wanted(budget=narrow))
        assert [quality is not None for quality in plan.curve] == [True, True, False, False]
        assert plan.within(narrow).drop == 0
        plan, _ = cache.load_or_compute(BASE, REQUEST, wanted=Wanted(budget=wide))
        assert plan.within(wide).drop == 4
        assert plan.quality(4) == one_depth(plan, 4)

    def test_a_budget_and_deeper_depths_together(self, cache):
        budget = Budget(max_kl=1e-6)
        plan, _ = cache.load_or_compute(BASE, REQUEST, wanted=Wanted(("2", "0"), budget))
        plan, _ = cache.load_or_compute(BASE, REQUEST, wanted=Wanted(("4",), budget))
        assert [plan.quality(depth) for depth in (2, 4)] == [one_depth(plan, d) for d in (2, 4)]

    def test_too_many_layers_are_refused(self, cache):
        with pytest.raises(PlanError, match="at most 4 can be dropped"):
            cache.load_or_compute(BASE, REQUEST, wanted=Wanted(("5",)))

    def test_evidence_on_other_tokens_is_not_mixed_in(self, cache):
        cache.load_or_compute(BASE, REQUEST)
        content = json.loads(entry(cache).read_text())
        content["calibration"]["fingerprint"] = "sha256:" + 64 * "0"
        entry(cache).write_text(json.dumps(content))
        with pytest.raises(PlanError, match="made with other calibration tokens"):
            cache.load_or_compute(BASE, REQUEST, wanted=Wanted(("1",)))


class TestGreedy:
    REQUEST = replace(REQUEST, strategy="greedy", samples=8, substitutes=SubstituteKind(3))

    @pytest.fixture
    def cache(self, tmp_path) -> PlanCache:
        return PlanCache(tmp_path / "plans")

    def test_plan_and_substitutes_come_back(self, cache):
        plan, origin = cache.load_or_compute(BASE, self.REQUEST)
        assert (plan.strategy, plan.candidates, origin) == ("greedy", 6, "computed")
        assert all(quality is not None for quality in plan.curve)
        again, origin = cache.load_or_compute(BASE, self.REQUEST)
        assert (again, origin) == (plan, "cached")
        substitutes = cache.substitutes(again)
        assert substitutes.fingerprint == plan.substitutes.fingerprint
        assert sorted(substitutes.by_layer) == [1, 2, 4, 5]
        assert not list(cache.folder.glob("*.partial"))

    def test_options_are_part_of_the_question(self, cache):
        cache.load_or_compute(BASE, self.REQUEST)
        for other in (SubstituteKind(2), SubstituteKind(None), None):
            request = replace(self.REQUEST, substitutes=other)
            assert cache.load_or_compute(BASE, request)[1] == "computed"
        assert cache.load_or_compute(BASE, replace(request, candidates=1))[1] == "computed"

    def test_lost_substitutes_are_fitted_again(self, cache, caplog):
        plan, _ = cache.load_or_compute(BASE, self.REQUEST)
        (path,) = cache.folder.glob("*.safetensors")
        path.write_bytes(b"damaged")
        with caplog.at_level(logging.WARNING):
            again, origin = cache.load_or_compute(BASE, self.REQUEST)
        assert (again.id, origin) == (plan.id, "computed")
        assert "measuring again" in caplog.text

    @pytest.fixture
    def broken_off(self, cache) -> None:
        """A search that ended after two of four layers."""

        def stop(what: str, done: int, total: int) -> None:
            if (what, done) == ("choosing layers", 2):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.load_or_compute(BASE, self.REQUEST, stop)

    def resume(self, cache: PlanCache) -> tuple[Plan, list[int]]:
        chosen: list[int] = []

        def note(what: str, done: int, total: int) -> None:
            if what == "choosing layers":
                chosen.append(done)

        plan, _ = cache.load_or_compute(BASE, self.REQUEST, note)
        return plan, chosen

    def test_a_search_goes_on_where_it_was_broken_off(self, cache, broken_off):
        plan, chosen = self.resume(cache)
        assert chosen == [3, 4]
        assert plan.id == compute_plan(BASE, self.REQUEST)[0].id

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda content: "{", "cannot be read"),
            (lambda content: content.replace("sha256:", "sha256:0"), "tokens are other ones"),
            (lambda content: content.replace('"layer":', '"layer":9'), "does not fit the model"),
        ],
    )
    def test_what_does_not_fit_is_not_gone_on_with(self, cache, broken_off, caplog, damage, reason):
        (path,) = cache.folder.glob("*.partial")
        path.write_text(damage(path.read_text()))
        with caplog.at_level(logging.WARNING):
            _, chosen = self.resume(cache)
        assert chosen == [1, 2, 3, 4]
        assert reason in caplog.text

    def test_force_starts_over(self, cache, broken_off):
        chosen: list[int] = []
        cache.compute(
            BASE,
            self.REQUEST,
            lambda what, done, _: chosen.append(done) if what == "choosing layers" else None,
        )
        assert chosen == [1, 2, 3, 4]
