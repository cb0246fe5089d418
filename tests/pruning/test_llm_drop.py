"""Drop lists of the LLM-Drop project, read into plans and written from plans."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pruning.llm_drop import DropLists, plan_from_llm_drop, read_drop_lists, write_drop_lists
from pruning.plan import PlanError, SubstitutesRecord, read_plan, write_plan
from pruning.plan_cache import PlanRequest, compute_plan
from pruning.targets import Sublayers
from tests.pruning.tiny_models import tiny_base

BASE = tiny_base(layers=6)


@pytest.fixture
def config(tmp_path):
    def write(**content: object) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        return path

    return write


class TestRead:
    def test_indices_in_their_order(self, config):
        path = config(num_hidden_layers=6, drop_attn_list=[4, 1, 5], drop_mlp_list=[2])
        assert read_drop_lists(path) == DropLists((4, 1, 5), (2,), 6)

    def test_one_boolean_per_layer(self, config):
        flags = [False, True, False, False, False, True]
        assert read_drop_lists(config(num_hidden_layers=6, drop_attn_list=flags)).attention == (
            1,
            5,
        )

    @pytest.mark.parametrize("content", [{}, {"drop_attn_list": None}, {"drop_attn_list": []}])
    def test_missing_lists_are_empty(self, config, content):
        assert read_drop_lists(config(**content)) == DropLists((), (), None)

    @pytest.mark.parametrize("wrong", [["1"], [1.0], [1, True], "1,2", {"1": 2}, [True, False]])
    def test_malformed_lists(self, config, wrong):
        with pytest.raises(
            PlanError, match=r"drop_attn_list in .* must be a list of layer indices"
        ):
            read_drop_lists(config(num_hidden_layers=6, drop_attn_list=wrong))

    @pytest.mark.parametrize(
        ("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object, not a list")]
    )
    def test_not_a_config(self, tmp_path, text, message):
        path = tmp_path / "config.json"
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            read_drop_lists(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(PlanError, match=r"cannot read config .* No such file"):
            read_drop_lists(tmp_path / "none.json")


class TestImport:
    def test_a_plan_that_drops_the_list_in_order(self, config, tmp_path):
        plan = plan_from_llm_drop(config(num_hidden_layers=6, drop_attn_list=[4, 1, 5]), BASE)
        assert (plan.strategy, plan.calibration, plan.drop) == ("llm-drop", None, 3)
        assert plan.kept_layers() == {0, 2, 3}
        assert plan.dropped_layers(1) == {4}
        assert {step.cost for step in plan.ranking} == {None}
        plan.check_fits(BASE)
        write_plan(tmp_path / "plan.json", plan)
        assert read_plan(tmp_path / "plan.json") == plan

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"drop_attn_list": [], "drop_mlp_list": []}, "drops nothing"),
            ({"drop_mlp_list": [0]}, "drops the MLP of layer 0, which must be kept"),
            ({"drop_attn_list": [0, 1]}, "drops the attention of layer 0, which must be kept"),
            ({"drop_attn_list": [6]}, "layer 6 in ranking is not one of"),
            ({"drop_attn_list": [1, 1]}, "layer 1 is listed twice"),
            ({"drop_attn_list": [1], "num_hidden_layers": 8}, "of 8 layers, but tiny has 6"),
        ],
    )
    def test_refused(self, config, content, message):
        with pytest.raises(PlanError, match=message):
            plan_from_llm_drop(config(**content), BASE)

    @pytest.mark.parametrize(
        ("content", "target", "attention", "mlps"),
        [
            ({"drop_mlp_list": [4, 2]}, "mlp", set(), {4}),
            ({"drop_attn_list": [3], "drop_mlp_list": [3, 1]}, "joint", {3}, set()),
        ],
    )
    def test_mlps(self, config, content, target, attention, mlps):
        path = config(num_hidden_layers=6, **content)
        plan = plan_from_llm_drop(path, BASE)
        assert plan.target == target
        assert plan.dropped(1) == Sublayers(frozenset(attention), frozenset(mlps))
        path.write_text("{}")
        write_drop_lists(path, plan)
        again = read_drop_lists(path)
        assert list(again.attention) == content.get("drop_attn_list", [])
        assert list(again.mlp) == content["drop_mlp_list"]


class TestExport:
    @pytest.fixture(scope="class")
    def plan(self):
        return compute_plan(BASE, PlanRequest(samples=2, length=12))[0].with_drop(2)

    def test_round_trip_keeps_all_other_keys(self, config, plan, tmp_path):
        path = config(num_hidden_layers=6, drop_attn_list=[1], auto_map={"AutoConfig": "é"})
        write_drop_lists(path, plan)
        order = [step.layer for step in plan.ranking]
        assert json.loads(path.read_text()) == {
            "num_hidden_layers": 6,
            "drop_attn_list": order[:2],
            "auto_map": {"AutoConfig": "é"},
            "drop_mlp_list": [],
        }
        assert plan_from_llm_drop(path, BASE).dropped_layers() == plan.dropped_layers()
        write_drop_lists(path, plan, 4)
        assert read_drop_lists(path).attention == tuple(order[:4])
        assert os.listdir(tmp_path) == ["config.json"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"drop_mlp_list": [3]}, "drops the MLPs"),
            ({"num_hidden_layers": 32}, "of 32 layers, but tiny has 6"),
        ],
    )
    def test_refused_and_left_alone(self, config, plan, content, message):
        path = config(**content)
        with pytest.raises(PlanError, match=message):
            write_drop_lists(path, plan)
        assert json.loads(path.read_text()) == content

    def test_substitutes_cannot_be_carried(self, plan, tmp_path):
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"num_hidden_layers": 6}))
        record = SubstitutesRecord("linear", "sha256:" + 64 * "0")
        with pytest.raises(PlanError, match="this format cannot carry them"):
            write_drop_lists(config, replace(plan, substitutes=record))
