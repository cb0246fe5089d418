"""The server as `make serve` starts it, without any option: four-bit weights where they pay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pruning.budget import DEFAULT_BUDGET
from pruning.quantised import runs_here
from tests.api.calls import FULL, PROMPT, complete
from tests.live import LiveServer, serve


@pytest.fixture(scope="module")
def default() -> Iterator[LiveServer]:
    with serve() as server:
        yield server


def test_the_precision_is_told_and_keys_and_values_are_half_as_large(default: LiveServer) -> None:
    four_bits = runs_here(torch.device("cpu")) and not torch.cuda.is_available()
    assert any("weights: int4" in line for line in default.output) == four_bits
    if four_bits:
        assert default.metric("attndrop_variant_kv_bytes_per_token", variant="full") == 23_040


def test_pruned_drops_what_the_default_budget_allows_and_says_what_it_gave(
    default: LiveServer,
) -> None:
    models = default.client().get("/v1/models").json()["data"]
    found = {entry["variant"]["name"]: entry["variant"] for entry in models}
    assert 0 < len(found["pruned"]["dropped_layers"]) < 10
    assert 0 < found["pruned"]["quality"]["kl"] <= DEFAULT_BUDGET.max_kl
    assert found["full"]["quality"]["perplexity_ratio"] == 1
    kl = default.metric("attndrop_variant_quality_kl_nats", variant="pruned")
    assert kl == found["pruned"]["quality"]["kl"]
    assert any("the budget was KL at most 0.2" in line for line in default.output)
    assert any("--strategy greedy --substitutes linear" in line for line in default.output)


def test_the_answer_is_the_same_alone_and_among_others(default: LiveServer) -> None:
    with default.client() as http:
        alone = complete(http, headers=FULL, max_tokens=1)["choices"][0]["text"]
        many = complete(http, headers=FULL, max_tokens=1, prompt=[PROMPT] * 16)
    assert {choice["text"] for choice in many["choices"]} == {alone}
    assert alone.strip() == "Paris"
