"""Dropping MLPs, whole layers, and both kinds ranked together, against plain transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from pruning.budget import Budget
from pruning.evaluate import Evaluator
from pruning.evidence import Amount, read_evidence, write_evidence
from pruning.export.errors import ExportError
from pruning.export.exporting import export
from pruning.importance import measure_importance
from pruning.plan import PlanError, new_plan, plan_json, read_plan, write_plan
from pruning.plan_cache import PlanCache, PlanRequest, Wanted, compute_plan
from pruning.report.subject import Subject
from pruning.selection import DropStep
from pruning.sublayers import rows_kept, wrap
from pruning.substitutes import SubstituteKind
from pruning.targets import Sublayers
from tests.pruning.tiny_models import tiny_base, tiny_model
from tests.reference.divergence import cost
from tests.reference.silenced import silenced

LAYERS = 5
FAMILIES = ["llama", "gemma2", "olmo2", "granite", "phi3"]
BASE = tiny_base(layers=LAYERS)
TOKENS = torch.randint(4, 80, (5, 17), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("attention", "mlps"), [((), (2, 4)), ((1, 2), (2,)), ((3,), (1, 3))])
def test_every_row_without_some_sublayers(family, attention, mlps):
    plain = tiny_model(family, layers=LAYERS)
    wrapped = tiny_model(family, layers=LAYERS)
    wrap(wrapped)
    dropped = Sublayers(frozenset(attention), frozenset(mlps))
    with torch.no_grad():
        expected = silenced(plain, attention, mlps)(TOKENS, use_cache=False).logits
        found = wrapped(TOKENS, **rows_kept(LAYERS, TOKENS.shape[1], dropped)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_of_mlps_and_layers_is_what_plain_transformers_do(family):
    """X enters a layer, Y leaves it; an MLP starts from what the layer is without it."""
    plain = tiny_model(family, layers=LAYERS)
    seen: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    for index, layer in enumerate(plain.model.layers):

        def note(_, args, named, out, index=index):
            left = out[0] if isinstance(out, tuple) else out
            seen[index] += [args[0] if args else named["hidden_states"], left]

        layer.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        plain(TOKENS, use_cache=False)
    scores = measure_importance(tiny_base(family, layers=LAYERS), TOKENS, "block", batch_size=2)
    for score, (x, y) in zip(scores, seen, strict=True):
        cosine = functional.cosine_similarity(x.double(), y.double(), dim=-1).mean().item()
        assert score == pytest.approx(1 - cosine, abs=1e-5)
    scores = measure_importance(tiny_base(family, layers=LAYERS), TOKENS, "mlp", batch_size=2)
    for index, score in enumerate(scores):
        without = silenced(plain, (), [index])
        left: list[torch.Tensor] = []
        without.model.layers[index].register_forward_hook(
            lambda _, __, out, left=left: left.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            without(TOKENS, use_cache=False)
        cosine = functional.cosine_similarity(left[0].double(), seen[index][1].double(), dim=-1)
        assert score == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


REQUEST = PlanRequest(samples=4, length=12, protected=frozenset({2}))


@pytest.mark.parametrize("target", ["attention", "mlp", "block", "joint"])
def test_a_plan_says_what_each_depth_costs(target, tmp_path):
    request = replace(REQUEST, target=target)
    cache = PlanCache(tmp_path / "plans")
    plan, _ = cache.load_or_compute(BASE, request, wanted=Wanted(budget=Budget(max_kl=1e6)))
    most = 6 if target == "joint" else 3
    assert (plan.target, len(plan.ranking), plan.whole) == (target, most, LAYERS * (most // 3))
    costs = [step.cost for step in plan.ranking]
    assert costs == sorted(costs)
    _, held_out = cache.calibration_of(plan).split()
    plain = tiny_model(layers=LAYERS)
    sizes = {"attention": (1, 0), "mlp": (0, 1), "block": (1, 1)}
    for depth in range(1, most + 1):
        dropped = plan.dropped(depth)
        found = (len(dropped.attention), len(dropped.mlps))
        assert sum(found) == depth * (2 if target == "block" else 1)
        assert target == "joint" or found == tuple(depth * n for n in sizes[target])
        expected = cost(plain, silenced(plain, dropped.attention, dropped.mlps), held_out)
        assert plan.quality(depth).kl == pytest.approx(expected.kl, abs=2e-6)
    assert plan.dropping("40%").drop == (4 if target == "joint" else 2)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    assert cache.load_or_compute(BASE, request) == (plan, "cached")
    text = json.loads(plan_json(plan))["ranking"][0]
    assert ("sublayer" in text) == (target == "joint")
    if target == "joint":
        scores = [
            measure_importance(BASE, cache.calibration_of(plan).split()[0], each)
            for each in ("attention", "mlp")
        ]
        for step in plan.ranking:
            assert step.cost == pytest.approx(scores[step.sublayer == "mlp"][step.layer], abs=1e-6)


def test_evaluation_of_a_joint_plan(tmp_path):
    steps = [(1, "mlp"), (3, "attention"), (3, "mlp")]
    ranking = tuple(DropStep(layer, None, sublayer=each) for layer, each in steps)
    plan = new_plan(BASE, "cosine", ranking, (0,), None, target="joint")
    amount = Amount(windows=3, length=16, prompts=1, answer=4)
    evaluator = Evaluator(BASE, plan, None, [1, 3], amount)
    evaluator._compare("text", "random", [(TOKENS[:3], 1)])
    found = evaluator.result()
    plain = tiny_model(layers=LAYERS)
    for row, (attention, mlps) in zip(
        found.figures, [((), ()), ((), (1,)), ((3,), (1, 3))], strict=True
    ):
        expected = cost(plain, silenced(plain, attention, mlps), TOKENS[:3])
        assert row.kl == pytest.approx(expected.kl, abs=2e-6)
    assert found.attention_dropped == {0: 0, 1: 0, 3: 1}
    write_evidence(tmp_path / "found.json", found)
    assert read_evidence(tmp_path / "found.json") == found
    subject = Subject("joint", 0, found, None)
    assert subject.kv_bytes(1) == subject.kv_bytes(0) > subject.kv_bytes(3)


def test_what_cannot_be(tmp_path):
    for other, message in [
        ({"target": "heads"}, "target 'heads' is not one of attention, mlp, block, joint"),
        ({"target": "mlp", "strategy": "greedy"}, "--strategy greedy ranks attention only"),
        ({"target": "joint", "strategy": "search"}, "--strategy search ranks attention only"),
        ({"target": "mlp", "substitutes": SubstituteKind(None)}, "add --strategy greedy"),
    ]:
        with pytest.raises(PlanError, match=message):
            replace(REQUEST, **other)
    plan = compute_plan(BASE, replace(REQUEST, target="joint"))[0]
    path = tmp_path / "plan.json"
    for wrong in (
        plan_json(plan).replace('"sublayer": "mlp"', '"sublayer": "head"', 1),
        plan_json(plan).replace('"target": "joint"', '"target": "mlp"'),
    ):
        path.write_text(wrong)
        with pytest.raises(PlanError, match="names sublayer"):
            read_plan(path)
    with pytest.raises(ExportError, match="drops MLPs, which of these formats only llm-drop"):
        export("none", plan.with_drop(6), "gguf", tmp_path / "out.gguf")
