"""Plans: the numbers in them, the file format, the checks, and the cache."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.budget import Budget
from pruning.divergence import Baseline, Quality
from pruning.plan import (
    MAX_PLAN_BYTES,
    Healed,
    HealedOn,
    Plan,
    PlanError,
    SubstitutesRecord,
    parse_drop,
    plan_json,
    read_plan,
    write_plan,
)
from pruning.plan_cache import PlanRequest, compute_plan
from tests.pruning.tiny_models import tiny_base

BASE = tiny_base(layers=6)
REQUEST = PlanRequest(samples=2, length=12, protected=frozenset({3}))


@pytest.fixture(scope="module")
def plan() -> Plan:
    plan, substitutes = compute_plan(BASE, REQUEST)
    assert substitutes is None
    return plan.with_drop(2)


JUDGED = {1: Quality(0.1, 0.9, 11.0), 2: Quality(0.3, 0.8, 12.0), 3: Quality(0.2, 0.7, 15.0)}


@pytest.fixture(scope="module")
def judged(plan) -> Plan:
    """The plan, with made-up quality of the first three of four depths."""
    return plan.judged(Baseline(100, 10.0), JUDGED)


HEALED = Healed(
    drop=2,
    steps=100,
    tokens=5000,
    learning_rate=0.05,
    batch=4,
    length=32,
    seed=0,
    seconds=12.5,
    dtype="float32",
    on=(
        HealedOn(
            source="self",
            fingerprint="sha256:" + 64 * "a",
            tokens=900,
            held_out=Baseline(100, 9.0),
            before=Quality(0.3, 0.7, 12.0),
            after=Quality(0.1, 0.9, 10.0),
        ),
    ),
)


@pytest.fixture(scope="module")
def healed(judged) -> Plan:
    """The plan, as if substitutes for two dropped layers had been healed."""
    record = SubstitutesRecord("linear", "sha256:" + 64 * "b", HEALED)
    return judged.healed(record, Baseline(100, 10.0), {2: JUDGED[2]})


class TestContent:
    def test_says_what_it_was_made_of(self, plan):
        assert (plan.model.name, plan.model.family, plan.model.layers) == ("tiny", "llama", 6)
        assert plan.model.fingerprint == BASE.fingerprint
        assert plan.calibration is not None
        assert (plan.calibration.sources, plan.calibration.seed) == (("self",), 0)
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
        assert plan.judged(Baseline(100, 10.0), JUDGED).id == plan.id
        assert replace(plan, ranking=plan.ranking[::-1]).id != plan.id

    def test_computing_again_gives_the_same_plan(self, plan):
        assert compute_plan(tiny_base(layers=6), REQUEST)[0].id == plan.id


class TestQuality:
    def test_what_each_depth_costs(self, judged):
        assert judged.quality() == judged.quality(2) == JUDGED[2]
        assert judged.quality(0) == Quality(0.0, 1.0, 10.0)
        assert judged.quality(4) is None
        assert judged.curve == (*JUDGED.values(), None)

    def test_nothing_is_known_before_it_is_measured(self, plan):
        assert plan.quality(0) is plan.quality() is None

    def test_a_budget_chooses_the_deepest_that_stays_inside(self, judged):
        budget = Budget(max_kl=0.25, max_perplexity_ratio=1.5)
        chosen = replace(judged, ranking=judged.ranking[:3]).within(budget)
        assert (chosen.drop, chosen.budget) == (3, budget)
        assert chosen.with_drop(1).budget is None

    def test_a_budget_that_the_curve_does_not_settle_is_refused(self, plan, judged):
        for unsettled in (plan, judged):
            with pytest.raises(PlanError, match="does not say what enough of its depths cost"):
                unsettled.within(Budget(max_kl=0.25))
        assert judged.within(Budget(max_kl=0.05)).drop == 0


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

    def test_healed_substitutes_come_back_and_do_not_change_the_id(self, healed, tmp_path):
        write_plan(tmp_path / "p.json", healed)
        assert read_plan(tmp_path / "p.json") == healed
        before = replace(healed, substitutes=replace(healed.substitutes, healed=None))
        assert healed.id == before.id
        assert [healed.quality(depth) for depth in (1, 2, 3)] == [None, JUDGED[2], None]

    def test_plans_with_substitutes_from_before_healing_are_read(self, healed, tmp_path):
        content = json.loads(plan_json(healed))
        del content["substitutes"]["healed"]
        (tmp_path / "p.json").write_text(json.dumps(content))
        read = read_plan(tmp_path / "p.json")
        assert read.substitutes.healed is None
        assert read.id == healed.id

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"drop": 5}, "were healed for 5 dropped layers"),
            ({"drop": 0}, "were healed for 0 dropped layers"),
            ({"steps": -1}, "healed.steps, tokens and seconds must be 0 or more"),
            ({"seconds": float("inf")}, "healed.steps, tokens and seconds must be 0 or more"),
            ({"learning_rate": 0.0}, "learning_rate must be above 0"),
            ({"on": (replace(HEALED.on[0], fingerprint="x"),)}, "healed.on.0.fingerprint must be"),
            ({"on": (replace(HEALED.on[0], after=Quality(0.1, 1.5, 2.0)),)}, "not one that can be"),
            ({"on": (replace(HEALED.on[0], held_out=Baseline(0, 9.0)),)}, "at least one token"),
        ],
    )
    def test_records_of_healing_that_cannot_be(self, healed, change, message):
        record = replace(healed.substitutes, healed=replace(HEALED, **change))
        with pytest.raises(PlanError, match=message):
            replace(healed, substitutes=record)

    def test_a_step_is_one_line_for_the_reader(self, plan):
        step = plan.ranking[0]
        line = f'    {{ "layer": {step.layer}, "cost": {step.cost!r}, "quality": null }},\n'
        assert line in plan_json(plan)

    def test_quality_and_budget_come_back_too(self, judged, tmp_path):
        plan = judged.within(Budget(max_kl=0.05))
        write_plan(tmp_path / "plan.json", plan)
        assert read_plan(tmp_path / "plan.json") == plan
        assert (
            '"quality": { "kl": 0.1, "agreement": 0.9, "perplexity": 11.0 } },\n'
            in (tmp_path / "plan.json").read_text()
        )

    @pytest.mark.parametrize(
        ("keys", "value", "message"),
        [
            (["format"], "other", "its format is 'other' version 2"),
            (["version"], 1, "version 1, but this release reads 'attndrop-plan' version 2; comp"),
            (["target"], "heads", "is not one of attention, mlp, block, joint"),
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
            (["ranking", 1, "quality"], {"kl": 0.1}, "agreement: Field required"),
            (
                ["ranking", 1, "quality"],
                {"kl": 0.1, "agreement": 2.0, "perplexity": 9.0},
                "is not one that can be measured",
            ),
            (
                ["ranking", 1, "quality"],
                {"kl": 0.1, "agreement": 0.5, "perplexity": 9.0},
                "held_out does not say on what",
            ),
            (["held_out"], {"tokens": 0, "perplexity": 9.0}, "at least one token"),
            (["candidates"], 0, "candidates must be at least 1"),
            (["substitutes"], {"kind": "cubic", "fingerprint": "sha256:" + 64 * "0"}, "'cubic'"),
            (["substitutes"], {"kind": "linear", "fingerprint": "abc"}, "substitutes.fingerprint"),
            (["budget"], {"max_kl": -1.0}, "--max-kl must be above 0"),
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
        newer = {"searched"}  # plans of this version from before it lack it
        for name in json.loads(plan_json(plan)).keys() - newer:
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
