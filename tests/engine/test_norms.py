"""A model's last norm by native code against the norm that it stands for, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning.quantised import runs_here
from server.engine.native import NativeFunctions
from server.engine.norms import root_mean_square, use_native_norm
from tests.pruning.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(
    not runs_here(torch.device("cpu")), reason="the functions need AVX-512"
)

ROUNDED = 2**-8


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite"])
@pytest.mark.parametrize("rows", [1, 8, 600])
@torch.inference_mode()
def test_the_last_norm_is_the_familys(
    native_of_this_processor: NativeFunctions, family: str, rows: int
) -> None:
    """Also where its input is a view, or so small that epsilon decides."""
    model = tiny_model(family, layers=1).bfloat16()
    norm = model.get_decoder().norm
    norm.weight.data = (torch.rand_like(norm.weight) + 0.5).bfloat16()
    use_native_norm(model, native_of_this_processor)
    native = model.get_decoder().norm
    assert native is not norm
    for scale in (1.0, 1e-3):
        hidden = (torch.randn(1, 2 * rows, norm.weight.numel()) * scale).bfloat16()[:, ::2]
        exact = norm(hidden.double())
        assert ((native(hidden) - exact).abs() <= exact.abs() * ROUNDED).all()
        assert torch.equal(native(hidden.float()), norm(hidden.float()))


def test_a_norm_of_another_form_stays(native_of_this_processor: NativeFunctions) -> None:
    model = tiny_model("llama", layers=1).bfloat16()
    other = model.get_decoder().norm = nn.LayerNorm(model.config.hidden_size).bfloat16()
    assert root_mean_square(other) is None
    use_native_norm(model, native_of_this_processor)
    assert model.get_decoder().norm is other
