"""Plans: the numbers in them, the file format, the checks, and the cache."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning import plan as plan_module
from pruning.calibration import CalibrationError
from pruning.plan import (
    MAX_PLAN_BYTES,
    Plan,
    PlanCache,
    PlanError,
    PlanRequest,
    compute_plan,
    parse_drop,
    plan_json,
    read_plan,
    write_plan,
)
from tests.pruning.tiny_models import tiny_base

BASE = tiny_base(layers=6)
REQUEST = PlanRequest(samples=2, length=12, protected=frozenset({3}))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compute_plan(BASE, REQUEST).with_drop(2)


class TestContent:
    def test_says_what_it_was_made_of(self, plan):
        assert (plan.model.name, plan.model.family, plan.model.layers) == ("tiny", "llama", 6)
        assert plan.model.fingerprint == BASE.fingerprint
        assert plan.calibration is not None
        assert (plan.calibration.source, plan.calibration.seed) == ("self", 0)
        assert (plan.calibration.samples, plan.calibration.length) == (2, 12)
        assert (plan.strategy, plan.target, plan.dtype) == ("cosine", "attention", "float32")
        assert plan.protected == (0, 3)
        assert sorted(step.layer for step in plan.ranking) == [1, 2, 4, 5]

    def test_dropped_layers_are_nested_prefixes_of_the_ranking(self, plan):
        assert plan.dropped_layers() == plan.dropped_layers(2)
        for count in range(4):
            assert plan.dropped_layers(count) < plan.dropped_layers(count + 1)
            assert plan.kept_layers(count) | plan.dropped_layers(count) == set(range(6))
        assert plan.kept_layers(4) == {0, 3}

    @pytest.mark.parametrize("count", [-1, 5])
    def test_no_more_than_the_ranking_holds(self, plan, count):
        message = f"cannot drop {count} layers: its ranking holds 4 of 6"
        with pytest.raises(PlanError, match=message):
            plan.dropped_layers(count)
        with pytest.raises(PlanError, match=message):
            plan.with_drop(count)

    def test_id_covers_what_decides_the_ranking_and_nothing_else(self, plan):
        assert len(plan.id) == 12
        later = replace(plan, created="2030-01-01T00:00:00Z", versions=replace(plan.versions))
        assert later.id == plan.with_drop(1).id == plan.id
        assert replace(plan, dtype="bfloat16").id != plan.id
        assert replace(plan, ranking=plan.ranking[::-1]).id != plan.id

    def test_computing_again_gives_the_same_plan(self, plan):
        assert compute_plan(tiny_base(layers=6), REQUEST).id == plan.id


class TestFits:
    def test_its_own_model(self, plan):
        plan.check_fits(BASE)

    def test_not_other_weights(self, plan):
        with pytest.raises(PlanError, match=r"made for the weights of tiny .* differ"):
            plan.check_fits(tiny_base(layers=6, seed=1))

    def test_not_another_number_of_layers(self, plan):
        with pytest.raises(PlanError, match="with 6 layers, but tiny has 4"):
            plan.check_fits(tiny_base(layers=4))


class TestDrop:
    @pytest.mark.parametrize(
        ("text", "drop"),
        [("0", 0), ("8", 8), (" 8 ", 8), ("25%", 7), ("50%", 15), ("99.9%", 29), ("3.34%", 1)],
    )
    def test_numbers_and_shares_of_all_layers_rounded_down(self, text, drop):
        assert parse_drop(text, layers=30, most=29) == drop

    @pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "5 %%", "%", "1e3", "٣", "1_0", "nan%"])
    def test_malformed(self, text):
        with pytest.raises(PlanError, match="must be a number of layers"):
            parse_drop(text, layers=30, most=29)

    @pytest.mark.parametrize("text", ["30", "100%", "400%"])
    def test_more_than_can_be_dropped(self, text):
        with pytest.raises(PlanError, match="at most 29 can be dropped"):
            parse_drop(text, layers=30, most=29)

    def test_a_share_that_is_no_layer_at_all(self):
        with pytest.raises(PlanError, match="less than one layer"):
            parse_drop("3%", layers=30, most=29)

    @given(st.integers(1, 200), st.integers(1, 100))
    def test_never_more_than_the_share(self, layers, percent):
        try:
            drop = parse_drop(f"{percent}%", layers=layers, most=layers)
        except PlanError:
            drop = 0
        assert drop * 100 <= percent * layers < (drop + 1) * 100


class TestFile:
    def test_round_trip(self, plan, tmp_path):
        write_plan(tmp_path / "plan.json", plan)
        assert read_plan(tmp_path / "plan.json") == plan
        assert os.listdir(tmp_path) == ["plan.json"]

    def test_a_step_is_one_line_for_the_reader(self, plan):
        step = plan.ranking[0]
        assert f'    {{ "layer": {step.layer}, "cost": {step.cost!r} }},\n' in plan_json(plan)

    @pytest.mark.parametrize(
        ("keys", "value", "message"),
        [
            (["format"], "other", "its format is 'other' version 1"),
            (["version"], 2, "version 2, but this release reads 'attndrop-plan' version 1"),
            (["target"], "mlp", "only 'attention' can be dropped"),
            (["extra"], 1, "extra: Unexpected keyword argument"),
            (["drop"], "2", "drop: Input should be a valid integer"),
            (["drop"], True, "drop: Input should be a valid integer"),
            (["drop"], 5, "cannot drop 5 layers"),
            (["drop"], -1, "cannot drop -1 layers"),
            (["model", "layers"], 4, "layer [45] in ranking is not one of .* 0 to 3"),
            (["model", "layers"], 0, "model.layers must be 1 to 1024, not 0"),
            (["model", "layers"], 10**12, "model.layers must be 1 to 1024"),
            (["model", "fingerprint"], "abc", "model.fingerprint must be 'sha256:'"),
            (["calibration", "fingerprint"], "abc", "calibration.fingerprint must be 'sha256:'"),
            (["ranking", 1, "layer"], 0, r"layers \[0\] are protected, yet"),
            (["ranking", 1, "layer"], -1, "layer -1 in ranking is not one of"),
            (["ranking", 1, "layer"], 1.5, "ranking.1.layer: Input should be a valid integer"),
            (["ranking", 1, "cost"], float("nan"), "is not a finite number"),
            (["ranking", 1, "cost"], float("inf"), "is not a finite number"),
            (["ranking", 1, "cost"], "0.1", "ranking.1.cost: Input should be a valid number"),
            (["protected"], [3], "protected must list layer 0"),
            (["protected"], [0, 0], "layer 0 is listed twice in protected"),
            (["created"], "yesterday", "created must be a UTC time"),
        ],
    )
    def test_wrong_fields(self, plan, tmp_path, keys, value, message):
        content = json.loads(plan_json(plan))
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        path = tmp_path / "wrong.json"
        path.write_text(json.dumps(content))
        with pytest.raises(PlanError, match=message) as error:
            read_plan(path)
        assert str(error.value).startswith(f"plan {path} is not usable: ")
        assert "\n" not in str(error.value)

    def test_every_field_must_be_there(self, plan, tmp_path):
        path = tmp_path / "missing.json"
        for name in json.loads(plan_json(plan)):
            content = json.loads(plan_json(plan))
            del content[name]
            path.write_text(json.dumps(content))
            with pytest.raises(PlanError, match=f"{name}: Field required"):
                read_plan(path)

    def test_duplicate_layers(self, plan, tmp_path):
        content = json.loads(plan_json(plan))
        content["ranking"].append(content["ranking"][0])
        path = tmp_path / "twice.json"
        path.write_text(json.dumps(content))
        with pytest.raises(PlanError, match="is listed twice in ranking"):
            read_plan(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0", "[" * 5000])
    def test_not_a_plan_at_all(self, tmp_path, text):
        path = tmp_path / "not.json"
        path.write_text(text)
        with pytest.raises(PlanError, match="is not usable"):
            read_plan(path)

    def test_missing_unreadable_and_too_large(self, tmp_path):
        with pytest.raises(PlanError, match="there is no plan file"):
            read_plan(tmp_path / "none.json")
        with pytest.raises(PlanError, match="Is a directory"):
            read_plan(tmp_path)
        large = tmp_path / "large.json"
        large.write_bytes(b" " * (MAX_PLAN_BYTES + 1))
        with pytest.raises(PlanError, match="has at most 1048576"):
            read_plan(large)

    def test_a_write_that_fails_leaves_the_old_plan_and_no_litter(
        self, plan, tmp_path, monkeypatch
    ):
        path = tmp_path / "plan.json"
        write_plan(path, plan)

        def full_disk(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(PlanError, match="No space left on device"):
            write_plan(path, plan.with_drop(1))
        assert read_plan(path) == plan
        assert os.listdir(tmp_path) == ["plan.json"]

    def test_no_such_folder(self, plan, tmp_path):
        with pytest.raises(PlanError, match=r"cannot write plan .* No such file"):
            write_plan(tmp_path / "none" / "plan.json", plan)


class TestRequest:
    def test_unknown_strategy(self):
        with pytest.raises(PlanError, match="strategy 'best' is not one of cosine"):
            PlanRequest(strategy="best")

    def test_protected_layers_must_exist(self):
        with pytest.raises(PlanError, match=r"protected layers \[6\] do not exist"):
            compute_plan(BASE, replace(REQUEST, protected=frozenset({6})))


def entry(cache: PlanCache) -> Path:
    (path,) = cache.folder.iterdir()
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
        request = replace(REQUEST, calibration=str(path))
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
        write_plan(entry(cache), compute_plan(base, request_))
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
        monkeypatch.setattr(plan_module, "compute_plan", lambda *_: pytest.fail("measured first"))
        with pytest.raises(PlanError, match="set ATTNDROP_CACHE_DIR"):
            PlanCache(tmp_path / "file" / "plans").load_or_compute(BASE, REQUEST)

    def test_errors_in_the_data_come_through(self, cache):
        with pytest.raises(CalibrationError, match="there is no calibration file"):
            cache.load_or_compute(BASE, replace(REQUEST, calibration="none.txt"))

    def test_latest(self, cache, caplog):
        with pytest.raises(PlanError, match="compute one with `attndrop plan --model tiny`"):
            cache.latest("tiny")
        plan, _ = cache.load_or_compute(BASE, REQUEST)
        (cache.folder / "damaged.json").write_text("{")
        newer = replace(plan, created="2999-01-01T00:00:00Z", dtype="bfloat16")
        write_plan(cache.folder / "newer.json", newer)
        assert cache.latest("tiny") == newer
        assert "skipped: plan" in caplog.text
