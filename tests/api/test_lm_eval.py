"""lm-evaluation-harness, unchanged, scores both variants exactly as plain transformers does.

The reference for `pruned` is the unmodified model with the output projections of the dropped
layers set to zero: an attention that adds exactly 0 is a dropped sublayer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning.loading import BaseModel
from tests.api.calls import FULL, MODEL, complete
from tests.live import LiveServer

DATA = Path(__file__).parent / "data" / "kitchen.json"
ITEMS = 12
TASK = {
    "task": "kitchen",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(DATA)}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
CHOOSING = {
    **TASK,
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
WRITING = {
    **TASK,
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "temperature": 0, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@dataclass(frozen=True, slots=True)
class Scored:
    """One choice of one question."""

    logprob: float
    is_greedy: bool


@pytest.fixture(autouse=True, scope="module")
def data_sets_stay_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the network, and the user's cache of data sets is left alone."""
    folder = tmp_path_factory.mktemp("datasets").as_posix()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def reference(base: BaseModel) -> PreTrainedModel:
    """The unmodified model, loaded by transformers alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(base.model.name_or_path), dtype=torch.float32
    )
    return model


def evaluated(
    live: LiveServer, variant: str, task: dict[str, Any], limit: int | None = None
) -> dict[str, Any]:
    """Return what lm-eval finds for a variant, which is chosen by its model id."""
    found: dict[str, Any] | None = simple_evaluate(
        model="local-completions",
        model_args={
            "model": f"{MODEL}:{variant}",
            "base_url": f"{live.url}/v1/completions",
            "max_retries": 1,
        },
        batch_size=8,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
    )
    assert found is not None
    return found


def test_scores_equal_those_of_plain_transformers(
    live: LiveServer, http: httpx.Client, base: BaseModel, reference: PreTrainedModel
) -> None:
    sums = {}
    for variant, count in (("full", 0), ("pruned", 15)):
        dropped = http.get(f"/v1/models/{MODEL}:{variant}").json()["variant"]["dropped_layers"]
        assert len(dropped) == count
        found = evaluated(live, variant, CHOOSING)
        samples = found["samples"][TASK["task"]]
        with without_attention(reference, dropped):
            expected = [
                [scored(reference, base.tokenizer, *pair) for pair in sample["arguments"]]
                for sample in samples
            ]
        assert_equal(samples, expected)
        hits = sum(best(s) == x["doc"]["answer"] for s, x in zip(expected, samples, strict=True))
        assert found["results"][TASK["task"]]["acc,none"] == pytest.approx(hits / ITEMS)
        sums[variant] = sum(choice.logprob for scores in expected for choice in scores)
    assert abs(sums["full"] - sums["pruned"]) > 1, "otherwise this shows nothing about variants"


def assert_equal(samples: Sequence[dict[str, Any]], expected: Sequence[Sequence[Scored]]) -> None:
    assert len(samples) == ITEMS
    for sample, scores in zip(samples, expected, strict=True):
        assert len(scores) == 4
        for (logprob, is_greedy), wanted in zip(sample["filtered_resps"], scores, strict=True):
            assert logprob == pytest.approx(wanted.logprob, abs=1e-3)
            assert is_greedy is wanted.is_greedy


@torch.inference_mode()
def scored(model: PreTrainedModel, tokenizer: Any, context: str, choice: str) -> Scored:
    """Return the log probability of `choice` after `context`, from one plain forward pass."""
    start = tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context + choice, add_special_tokens=False)["input_ids"]
    assert whole[: len(start)] == start
    logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)[len(start) - 1 : -1]
    targets = torch.tensor(whole[len(start) :])
    total = logprobs.gather(1, targets[:, None]).double().sum().item()
    return Scored(total, bool((logprobs.argmax(-1) == targets).all()))


def best(scores: Sequence[Scored]) -> int:
    return max(range(len(scores)), key=lambda choice: scores[choice].logprob)


@contextmanager
def without_attention(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Set the attention output of layers to zero for a while."""
    weights = [model.model.layers[layer].self_attn.o_proj.weight for layer in layers]
    kept = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data.zero_()
    yield
    for weight, values in zip(weights, kept, strict=True):
        weight.data.copy_(values)


def test_it_can_generate_too(live: LiveServer, http: httpx.Client) -> None:
    samples = evaluated(live, "full", WRITING, limit=3)["samples"][TASK["task"]]
    assert len(samples) == 3
    for sample in samples:
        answer = complete(http, FULL, prompt=sample["doc"]["question"], max_tokens=8, stop=".")
        assert sample["resps"] == [[answer["choices"][0]["text"]]]
