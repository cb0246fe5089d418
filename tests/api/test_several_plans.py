"""Variants of several plans that do not nest, over HTTP, against plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning.loading import BaseModel, load_base_model
from pruning.plan import PlanError, SubstitutesRecord, new_plan, write_plan
from pruning.selection import DropStep
from pruning.substitutes import LinearSubstitute, SubstituteError, Substitutes
from server.config import Settings, VariantSetting
from server.planned import attach_substitutes
from server.startup import SettingsError, find_plan, make_variants, plan_variants
from tests.live import LiveServer, serve
from tests.pruning.tiny_models import tiny_base, tiny_model
from tests.reference.silenced import greedy, silenced

LAYERS, TOKENS = 6, 12
DROPPED = {
    "full": [],
    "pruned": [4, 2],
    "light": [4],
    "searched": [1, 5],
    "deep": [1, 5, 3],
    "joint": [4],
}
MLPS = {"joint": [3, 4]}
PROMPTS = ("All work", "and no play makes Jack a dull boy")


@pytest.fixture(scope="module")
def plain(base: BaseModel) -> PreTrainedModel:
    """A tiny model for a real tokenizer."""
    torch.manual_seed(0)
    config = tiny_model(layers=LAYERS).config
    config.vocab_size = len(base.tokenizer)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def folder(
    plain: PreTrainedModel, base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    plain.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(folder: Path) -> BaseModel:
    return load_base_model(str(folder), dtype="float32")


def planned(
    base: BaseModel, path: Path, layers: list[int], drop: int, maps: Substitutes | None = None
) -> str:
    """Write a plan and return its file."""
    record = None if maps is None else SubstitutesRecord("linear", maps.fingerprint)
    ranking = tuple(DropStep(layer, None) for layer in layers)
    plan = new_plan(base, "greedy", ranking, (0,), None, substitutes=record)
    write_plan(path, plan.with_drop(drop), maps)
    return str(path)


@pytest.fixture(scope="module")
def server(
    folder: Path, tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    plans = tmp_path_factory.mktemp("plans")
    own = planned(tiny, plans / "own.json", DROPPED["pruned"], 2)
    other = planned(tiny, plans / "other.json", DROPPED["deep"], 2)
    steps = [("attention", 4), ("mlp", 3), ("mlp", 4)]
    ranking = tuple(DropStep(layer, None, sublayer=each) for each, layer in steps)
    joint = plans / "joint.json"
    write_plan(joint, new_plan(tiny, "cosine", ranking, (0,), None, target="joint").with_drop(3))
    variants = ("light=1", f"searched={other}", f"deep={other}:50%", f"joint={joint}")
    options = ["--model", str(folder), "--plan", own, "--kv-cache-memory", "8MiB"]
    with serve([*options, *(each for v in variants for each in ("--variant", v))]) as server:
        yield server


def test_all_variants_answer_together_like_plain_transformers(
    server: LiveServer, plain: PreTrainedModel, tiny: BaseModel
) -> None:
    with server.client() as http:
        models = http.get("/v1/models").json()["data"]

        def ask(variant: str, prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            headers = {"X-Model-Variant": variant}
            answer = http.post("/v1/completions", json=body, headers=headers)
            return str(answer.json()["choices"][0]["text"])

        asked = [(variant, prompt) for variant in DROPPED for prompt in PROMPTS]
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda each: ask(*each), asked))
    for (variant, prompt), answer in zip(asked, answers, strict=True):
        model = silenced(plain, DROPPED[variant], MLPS.get(variant, ()))
        tokens = greedy(model, tiny.tokenizer(prompt)["input_ids"], TOKENS)
        assert answer == tiny.tokenizer.decode(tokens)
    plans = {m["variant"]["name"]: m["variant"]["plan"] for m in models[1:]}
    assert plans["light"] == plans["pruned"] != plans["deep"] == plans["searched"]
    dropped = {m["variant"]["name"]: m["variant"]["dropped_layers"] for m in models[1:]}
    assert dropped == {name: sorted(layers) for name, layers in DROPPED.items()}
    mlps = {m["variant"]["name"]: m["variant"]["dropped_mlps"] for m in models[1:]}
    assert mlps == {name: MLPS.get(name, []) for name in DROPPED}
    assert any("what searched and deep drops does not nest" in line for line in server.output)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("light=4", ("light", None, "4")),
        ("Half=50%", ("half", None, "50%")),
        ("other=plan.json", ("other", "plan.json", None)),
        ("other=a:b/plan.json:12.5%", ("other", "a:b/plan.json", "12.5%")),
    ],
)
def test_what_a_variant_asks_for(text: str, expected: tuple[str | None, ...]) -> None:
    assert VariantSetting.parse(text) == expected


def some(*layers: int, seed: int = 0) -> Substitutes:
    generator = torch.Generator().manual_seed(seed)
    return Substitutes(
        {
            layer: LinearSubstitute(torch.randn(32, 32, generator=generator), torch.zeros(32))
            for layer in layers
        }
    )


def test_what_cannot_be_served_together_is_refused(tmp_path: Path) -> None:
    base = tiny_base(layers=LAYERS)
    own = planned(base, tmp_path / "own.json", [4, 2], 1, some(4, 2))
    same = planned(base, tmp_path / "same.json", [4, 3], 2, some(4, 3))
    plain = planned(base, tmp_path / "plain.json", [4, 2], 2)

    def attach(*variants: str) -> None:
        settings = Settings(plan=own, variant=variants)
        plan, substitutes, _ = find_plan(settings, base, lambda *_: None)
        found = plan_variants(settings, base, plan, substitutes)
        make_variants(settings, found)
        attach_substitutes(base, found)

    attach("deep=2")
    with pytest.raises(SubstituteError, match="'pruned' and 'plain' both drop the attention of"):
        attach(f"plain={plain}:1")
    with pytest.raises(SettingsError, match="--variant names 'a' twice"):
        attach("a=1", f"A={same}")
    with pytest.raises(PlanError, match="there is no plan file 'some'"):
        attach("a=some")
    attach(f"other={same}:1")
    with pytest.raises(SubstituteError, match="'deep' and 'other' both"):
        attach("deep=2", f"other={planned(base, tmp_path / 'x.json', [2], 1, some(2, seed=1))}")
