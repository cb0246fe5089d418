"""A plan with substitutes over HTTP, against a reference written out in plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import torch

from pruning.loading import BaseModel
from pruning.plan import SubstitutesRecord, new_plan, write_plan
from pruning.selection import DropStep
from pruning.substitutes import LinearSubstitute, Substitutes
from tests.live import LiveServer, serve
from tests.reference.llama import ReferenceLlama

DROPPED = {"full": [], "light": [25], "pruned": [25, 26]}
WIDTH, RANK, TOKENS = 576, 8, 6
PROMPTS = ("The capital of France is", "Once upon a time")


def some() -> Substitutes:
    """One of full rank and one of rank 8, small beside what attention adds, as fitted ones are."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    whole = LinearSubstitute(randn(WIDTH, WIDTH) / 200, randn(WIDTH) / 10)
    low = LinearSubstitute(randn(WIDTH, RANK) / 20, randn(WIDTH) / 10, randn(RANK, WIDTH) / 20)
    return Substitutes({25: whole, 26: low})


@pytest.fixture(scope="module")
def server(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    record = SubstitutesRecord("linear", some().fingerprint)
    ranking = tuple(DropStep(layer, None) for layer in DROPPED["pruned"])
    plan = new_plan(base, "greedy", ranking, (0,), None, substitutes=record)
    write_plan(path, plan.with_drop(2), some())
    options = ["--plan", str(path), "--variant", "light=1", "--dtype", "float32"]
    with serve([*options, "--kv-cache-memory", "64MiB"]) as server:
        yield server


def test_each_variant_answers_like_the_reference_with_its_substitutes(
    server: LiveServer, base: BaseModel
) -> None:
    parameters = {"light": WIDTH * WIDTH + WIDTH}
    parameters["pruned"] = parameters["light"] + 2 * WIDTH * RANK + WIDTH
    maps = {
        layer: (each.weight if each.down is None else each.weight @ each.down, each.bias)
        for layer, each in some().by_layer.items()
    }
    texts = []
    with server.client() as http:
        for variant, dropped in DROPPED.items():
            model = http.get(f"/v1/models/{model_id(http)}:{variant}").json()["variant"]
            assert model["substitutes"]["parameters"] == parameters.get(variant, 0)
            body = {"prompt": list(PROMPTS), "max_tokens": TOKENS, "temperature": 0}
            headers = {"X-Model-Variant": variant}
            answer = http.post("/v1/completions", json=body, headers=headers).json()
            reference = ReferenceLlama(base.checkpoint, dropped, maps)
            for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
                tokens = reference.greedy(base.tokenizer(prompt)["input_ids"], TOKENS)
                assert choice["text"] == base.tokenizer.decode(tokens)
                texts.append(choice["text"])
    assert len(set(texts)) > len(PROMPTS), "the substitutes change nothing: the test is blind"
    assert any("2 substitutes" in line for line in server.output)


def model_id(http: httpx.Client) -> str:
    return str(http.get("/v1/models").json()["data"][0]["id"])
