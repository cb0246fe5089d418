"""Four-bit weights: exact where they can be, and the layers that use them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruning.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from pruning.quantised import (
    GROUP,
    EightBitSubstitute,
    FourBitLinear,
    QuantisationError,
    four_bits,
    is_on_grid,
    quantise,
    quantise_substitutes,
)
from pruning.substitutes import LinearSubstitute
from tests.pruning.tiny_models import tiny_base, tiny_model


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@given(st.integers(0, 2**31))
def test_a_weight_on_a_grid_is_found_again(seed: int) -> None:
    """As a Q4_1 file stores it: float16 scale and minimum, both ends of the grid in use."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 16, (8, 3, GROUP), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15
    scales = (torch.rand(8, 3, 1, generator=generator) * 0.1 + 1e-4).half().float()
    minima = (torch.rand(8, 3, 1, generator=generator) - 0.5).half().float()
    weight = (levels * scales + minima).flatten(1)
    found = four_bits(weight)
    assert torch.equal(found.levels.view_as(levels).long(), levels)
    assert error(found.expanded(), weight) < 1e-6


def test_any_weight_is_rounded_to_the_nearest_level() -> None:
    weight = torch.randn(16, 64)
    weight[3, :GROUP] = 0.25  # a group of one value
    found = four_bits(weight)
    steps = found.scales.repeat_interleave(GROUP, 1)
    assert ((found.expanded() - weight).abs() <= steps / 2 + 1e-6).all()


@pytest.mark.parametrize("rows", [1, 12, 13, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_few_and_many_rows(rows: int, bias: bool) -> None:
    linear = nn.Linear(64, 48, bias=bias)
    bits = four_bits(linear.weight.detach())
    layer = FourBitLinear(bits, linear.bias.detach() if bias else None)
    inputs = torch.randn(1, rows, 64).bfloat16()
    expected = inputs.float() @ bits.expanded().T + (linear.bias.detach() if bias else 0)
    assert error(layer(inputs), expected) < 1e-2


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    model.get_decoder().layers[0].self_attn.o_proj = nn.Linear(40, 32)  # type: ignore[no-untyped-call]
    with pytest.raises(QuantisationError, match=r"multiples of 32 .* o_proj has 40 and 32"):
        quantise(model)
    assert not is_on_grid(model)


def test_random_weights_are_not_on_a_grid() -> None:
    assert not is_on_grid(tiny_model("llama"))


def test_the_embedded_model_keeps_its_predictions(base: BaseModel) -> None:
    """Its file is of type Q4_1: nothing is rounded but bfloat16's activations and scales."""
    assert is_on_grid(base.model)
    small = load_base_model(EMBEDDED_MODEL, dtype="float32", device="cpu")
    quantise(small.model)
    text = "The first railway in the country was built to carry coal from the mines to the river."
    ids = torch.tensor([base.tokenizer(text * 8)["input_ids"]])
    with torch.inference_mode():
        exact = torch.log_softmax(base.model(ids).logits[0], -1)
        close = torch.log_softmax(small.model(ids).logits[0].float(), -1)
        one = torch.log_softmax(small.model(ids[:, :9]).logits[0].float(), -1)
    divergence = (exact.exp() * (exact - close)).sum(-1).mean()
    assert divergence < 0.01
    assert (exact.argmax(-1) == close.argmax(-1)).double().mean() > 0.95
    assert error(one.exp(), exact[:9].exp()) < 0.1


@pytest.mark.parametrize("rows", [1, 6, 12, 13])
@pytest.mark.parametrize("rank", [None, 64, 7])
def test_substitutes_in_eight_bits_are_close_to_exact_ones(rows: int, rank: int | None) -> None:
    bias = torch.randn(96)
    exact = LinearSubstitute(torch.randn(96, rank or 96), bias, rank and torch.randn(rank, 96))
    normed = torch.randn(1, rows, 96)
    expected = exact(normed)
    got = EightBitSubstitute(exact.to(torch.bfloat16))(normed.bfloat16())
    assert got.shape == expected.shape
    assert error(got, expected) < 0.02


def test_a_models_substitutes_are_put_into_eight_bits() -> None:
    base = tiny_base()
    width = base.model.config.hidden_size
    base.sublayers[1].substitute = LinearSubstitute(torch.eye(width), torch.zeros(width))
    quantise_substitutes(base)
    assert base.sublayers[0].substitute is None
    assert isinstance(base.sublayers[1].substitute, EightBitSubstitute)
