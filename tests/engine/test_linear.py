"""Few-row matrix products against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from server.engine.linear import _multiply, gated, linear

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 40, 512), (5, 100, 256), (33, 70, 768)]
)
def test_a_product_and_what_is_added(rows: int, outputs: int, inputs: int) -> None:
    x, weight = random(rows, inputs), random(outputs, inputs)
    product = x.double() @ weight.double().T
    for added in (None, random(outputs), random(rows, outputs)):
        expected = product if added is None else product + added.double()
        assert error(_multiply(x, weight, added, gated=False), expected) < TOLERANCE
        assert error(linear(x, weight, added), expected) < TOLERANCE


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 40, 512), (17, 100, 256)])
def test_a_gated_product(rows: int, outputs: int, inputs: int) -> None:
    x, weight = random(rows, inputs), random(2 * outputs, inputs)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    assert error(_multiply(x, weight, None, gated=True), expected) < TOLERANCE
    assert error(gated(x, weight), expected) < TOLERANCE


@pytest.mark.skipif(not ON_GPU, reason="narrow and wide rows take different ways on a GPU only")
@pytest.mark.parametrize("rows", [1, 16, 33, 64, 65, 300])
def test_every_number_of_rows(rows: int) -> None:
    x, weight, added = random(rows, 4096) / 64, random(6144, 4096), random(rows, 6144)
    product = x.double() @ weight.double().T
    assert error(linear(x, weight, added), product + added.double()) < TOLERANCE
    gate, up = product.chunk(2, dim=-1)
    assert error(gated(x, weight), functional.silu(gate) * up) < TOLERANCE
