"""Sampling: each parameter by itself against its definition, and determinism."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.batch import SamplingRow
from server.engine.request import SamplingParams
from server.engine.sampling import generated_scores, most_likely, score, uniform
from server.engine.sampling import sample as sampled

VOCABULARY = 12
LOGITS = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -9.0]])


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    return sampled(logits, rows).tolist()


def row(
    output: tuple[int, ...] = (), prompt: tuple[int, ...] = (), **params: object
) -> SamplingRow:
    return SamplingRow(SamplingParams(100, **params), prompt, output, pending=0)  # type: ignore[arg-type]


def drawn(count: int = 4000, **params: object) -> Counter[int]:
    rows = [row(seed=seed, **params) for seed in range(count)]
    return Counter(sample(LOGITS.expand(count, -1), rows))


def test_temperature_zero_is_greedy() -> None:
    assert sample(LOGITS, [row(temperature=0.0)]) == [0]


def test_the_first_of_equal_logits_is_the_most_likely() -> None:
    logits = torch.randint(0, 50, (9, 6 * 128)).float()
    best = logits.amax(-1, keepdim=True)
    first = [(row == most).nonzero()[0].item() for row, most in zip(logits, best, strict=True)]
    assert sample(logits, [row(temperature=0.0)] * 9) == first


@given(
    st.lists(
        st.lists(st.floats(width=16, allow_nan=False), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_numbers_of_16_bits_are_ordered_as_wider_ones(rows: list[list[float]]) -> None:
    """Above and below 0, either 0, both infinities, and equal ones."""
    logits = torch.tensor(rows).bfloat16()
    assert torch.equal(most_likely(logits), most_likely(logits.float()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    counts = drawn(temperature=temperature)
    expected = torch.softmax(LOGITS[0] / temperature, -1) * 4000
    chi = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected.tolist()) if e > 5)
    assert chi < 35, "a chi-square this large has a probability under one in 10,000"


def test_top_k_keeps_the_most_likely() -> None:
    assert set(drawn(top_k=3)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    probabilities = torch.softmax(LOGITS[0], -1)
    reach = probabilities.cumsum(0)
    inside = float(reach[2]) - 1e-3
    assert set(drawn(top_p=inside)) == {0, 1, 2}
    assert set(drawn(top_p=float(reach[2]) + 1e-3)) == {0, 1, 2, 3}
    assert set(drawn(top_p=1e-9)) == {0}


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert set(drawn(min_p=math.exp(-1.01))) == {0, 1, 2}


def test_truncations_apply_together_per_row() -> None:
    rows = [row(top_k=1, seed=s) for s in range(50)] + [row(temperature=0.0)]
    rows += [row(top_k=2, top_p=0.99, seed=s) for s in range(50)]
    tokens = sample(LOGITS.expand(len(rows), -1), rows)
    assert set(tokens[:51]) == {0}
    assert set(tokens[51:]) == {0, 1}


def test_logit_bias() -> None:
    assert sample(LOGITS, [row(temperature=0.0, logit_bias={7: 100.0})]) == [7]
    assert sample(LOGITS, [row(temperature=0.0, logit_bias={0: -100.0})]) == [1]


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    greedy = {"temperature": 0.0}
    assert sample(LOGITS, [row(output=(0,), presence_penalty=0.6, **greedy)]) == [1]
    assert sample(LOGITS, [row(prompt=(0,), presence_penalty=0.6, **greedy)]) == [0]
    assert sample(LOGITS, [row(output=(0,), frequency_penalty=0.3, **greedy)]) == [0]
    assert sample(LOGITS, [row(output=(0, 0), frequency_penalty=0.3, **greedy)]) == [1]


def test_repetition_penalty_counts_prompt_tokens_and_divides_or_multiplies() -> None:
    greedy = {"temperature": 0.0, "repetition_penalty": 1.5}
    assert sample(LOGITS, [row(prompt=(0,), **greedy)]) == [1]
    negative = LOGITS - 5
    assert sample(negative, [row(output=(0,), **greedy)]) == [1]


def test_ending_tokens_wait_for_min_tokens() -> None:
    ends = frozenset({0, 1})
    assert sample(LOGITS, [row((5,), temperature=0.0, min_tokens=2, stop_token_ids=ends)]) == [2]
    assert sample(LOGITS, [row((5, 5), temperature=0.0, min_tokens=2, stop_token_ids=ends)]) == [0]


def test_the_logits_are_kept() -> None:
    before = LOGITS.clone()
    sample(LOGITS, [row(logit_bias={3: 5.0}, repetition_penalty=2.0, prompt=(1,))])
    assert torch.equal(LOGITS, before)


def test_logprobs_are_the_models_own() -> None:
    rows = [row(logprobs=2, temperature=0.3, logit_bias={9: 50.0}), row()]
    scores = generated_scores(LOGITS.expand(2, -1), rows, torch.tensor([9, 0]))
    assert scores is not None
    found = scores.read()
    assert len(found) == 1
    expected = torch.log_softmax(LOGITS[0], -1)
    assert found[0].logprob == pytest.approx(float(expected[9]))
    assert [token for token, _ in found[0].top] == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 12)), min_size=1, max_size=5))
def test_a_token_has_the_identical_float_among_the_alternatives(
    asked: list[tuple[int, int]],
) -> None:
    tokens, alternatives = zip(*asked, strict=True)
    logits = torch.randn(len(asked), VOCABULARY)
    scored = score(logits, torch.tensor(tokens), alternatives).read()
    for entry, (token, count) in zip(scored, asked, strict=True):
        assert len(entry.top) == count
        among = dict(entry.top)
        if token in among:
            assert among[token] == entry.logprob
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)


@settings(max_examples=200)
@given(st.integers(-(2**63), 2**64), st.integers(0, 10**6))
def test_random_numbers_depend_on_seed_and_index_only(seed: int, index: int) -> None:
    assert 0 <= uniform(seed, index) < 1
    assert uniform(seed, index) == uniform(seed, index) != uniform(seed, index + 1)


def test_neighbouring_seeds_are_unrelated() -> None:
    numbers = [uniform(seed, 0) for seed in range(10_000)]
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02
    pairs = pairwise(numbers)
    mean = sum((a - 0.5) * (b - 0.5) for a, b in pairs) / len(numbers)
    assert abs(mean) < 0.005
