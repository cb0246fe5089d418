"""Greedy text over HTTP against a Llama written by hand: chunked, mixed, preempted, any order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pruning.loading import BaseModel
from tests.live import LiveServer, serve
from tests.reference.llama import ReferenceLlama

TOKENS = 12
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at 100 degrees because",
    "Once upon a time, in a small village by the sea, there lived a fisherman who",
]


@pytest.fixture(scope="module")
def tight() -> Iterator[LiveServer]:
    """A server that cuts prompts into chunks of 6 tokens and whose pages hold two requests."""
    options = ["--drop", "50%", "--dtype", "float32", "--max-step-tokens", "6"]
    with serve([*options, "--kv-cache-memory", "2880KiB", "--max-model-len", "48"]) as server:
        yield server


@pytest.fixture(scope="module")
def expected(tight: LiveServer, base: BaseModel) -> dict[tuple[str, str], str]:
    """Each prompt's text by each variant, computed one by one without the server."""
    texts = {}
    for model in tight.client().get("/v1/models").json()["data"][1:]:
        variant = model["variant"]
        reference = ReferenceLlama(base.checkpoint, variant["dropped_layers"])
        for prompt in PROMPTS:
            tokens = reference.greedy(base.tokenizer(prompt)["input_ids"], TOKENS)
            texts[variant["name"], prompt] = base.tokenizer.decode(tokens, skip_special_tokens=True)
    return texts


def complete(server: LiveServer, variant: str, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    with server.client(headers={"X-Model-Variant": variant}) as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.headers["X-Model-Variant"] == variant
    return answer.json()["choices"][0]["text"]


def test_alone(tight: LiveServer, expected: dict[tuple[str, str], str]) -> None:
    for (variant, prompt), text in expected.items():
        assert complete(tight, variant, prompt) == text


@pytest.mark.parametrize("order", range(3))
def test_together_in_any_order(
    tight: LiveServer, expected: dict[tuple[str, str], str], order: int
) -> None:
    calls = list(expected) * 2
    random.Random(order).shuffle(calls)
    with ThreadPoolExecutor(len(calls)) as pool:
        texts = list(pool.map(lambda call: complete(tight, *call), calls))
    assert texts == [expected[call] for call in calls]


def test_some_were_preempted_and_all_pages_came_back(tight: LiveServer) -> None:
    preempted = [
        tight.metric("attndrop_preemptions_total", variant=name) for name in ("full", "pruned")
    ]
    assert sum(preempted) > 0
    for name in ("full", "pruned"):
        assert tight.metric("attndrop_kv_cache_used_bytes", variant=name) == 0


def test_the_same_pool_holds_twice_as_many_pruned_tokens(live: LiveServer) -> None:
    def of(name: str, variant: str) -> float:
        return live.metric(f"attndrop_variant_{name}", variant=variant)

    assert of("kv_bytes_per_token", "full") == 2 * of("kv_bytes_per_token", "pruned") == 46080
    assert of("attention_layers", "pruned") == 15
    capacity = live.metric("attndrop_kv_cache_capacity_bytes")
    assert of("capacity_tokens", "pruned") * of("kv_bytes_per_token", "pruned") <= capacity


def test_halved_from_another_pool(tight: LiveServer) -> None:
    """Two layer groups of 15 layers each: exactly twice the tokens."""
    full = tight.metric("attndrop_variant_capacity_tokens", variant="full")
    assert tight.metric("attndrop_variant_capacity_tokens", variant="pruned") == 2 * full
