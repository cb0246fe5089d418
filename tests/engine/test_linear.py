"""Few-row matrix products against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from server.engine import shared_inputs
from server.engine.eight_bits import KINDS, EightBits, Kind, eight_bits
from server.engine.gated_rows import gated_of_some_rows, gated_tiles
from server.engine.linear import (
    _MOST_ROWS_OF_EIGHT_BITS,
    _multiply,
    add_product,
    gated,
    linear,
)
from server.engine.many_rows import expanded, in_float8, scaled_linear
from server.engine.packing import in_order, interleave

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
        assert error(_multiply(x, weight, added, None, gated=False), expected) < TOLERANCE
        assert error(linear(x, weight, added), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 8, 16), (5, 8, 16), (1, 2048, 256), (40, 2048, 256)]
)
def test_a_product_goes_into_a_sum(rows: int, outputs: int, inputs: int) -> None:
    """By torch and by the kernel, which is for wide weights."""
    x, weight, total = random(rows, inputs), random(outputs, inputs), random(rows, outputs)
    if rows == 1:
        total = total.as_strided((1, outputs), (0, 1))  # as the compiler has it
    expected = total.double() + x.double() @ weight.double().T
    add_product(x, weight, total)
    assert error(total, expected) < TOLERANCE


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 40, 512), (17, 100, 256)])
def test_a_gated_product(rows: int, outputs: int, inputs: int) -> None:
    x, weight = random(rows, inputs), random(2 * outputs, inputs)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    assert error(_multiply(x, weight, None, None, gated=True), expected) < TOLERANCE
    assert error(gated(x, weight), expected) < TOLERANCE


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(65, 104, 192), (33, 72, 192)])
def test_a_gated_product_of_some_rows(rows: int, outputs: int, inputs: int) -> None:
    x, weight = random(rows, inputs), random(2 * outputs, inputs)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    assert error(gated_of_some_rows(x, weight), functional.silu(gate) * up) < TOLERANCE


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 8, 64), (130, 200, 96), (300, 136, 72), (2200, 8, 8)]
)
def test_a_gated_product_in_tiles(rows: int, outputs: int, inputs: int) -> None:
    """Of one tile, of tiles that nothing fills to the end, and of more than one band."""
    x, weight = random(rows, inputs), random(2 * outputs, inputs)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    assert error(gated_tiles(x, weight), functional.silu(gate) * up) < TOLERANCE


def test_tiles_take_rows_that_do_not_lie_side_by_side() -> None:
    wide, weight = random(140, 2 * 64), random(2 * 40, 64)
    x = wide[:, 64:]
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    assert error(gated_tiles(x, weight), functional.silu(gate) * up) < TOLERANCE


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(65, 100, 320), (33, 64, 648), (2, 8, 64)])
def test_a_product_whose_programs_share_inputs(rows: int, outputs: int, inputs: int) -> None:
    """Parts that are whole, begun, and empty; outputs that fill no band."""
    x, weight = random(rows, inputs), random(outputs, inputs)
    exact = x.double() @ weight.double().T
    for added in (None, random(outputs), random(rows, outputs)):
        expected = exact if added is None else exact + added.double()
        assert error(shared_inputs.product(x, weight, added), expected) < TOLERANCE
    total, beside = random(rows, 2 * outputs).chunk(2, dim=1)
    expected, untouched = exact + total.double(), beside.clone()
    assert shared_inputs.product(x, weight, total, into=total) is total
    assert error(total, expected) < TOLERANCE
    assert torch.equal(beside, untouched)


@pytest.mark.skipif(not ON_GPU, reason="which product runs depends on the device")
def test_whole_boxes_of_rows_share_long_inputs() -> None:
    """As many as fill the device, and no more."""
    outputs = 64 * (torch.cuda.get_device_properties(0).multi_processor_count // 2)
    weight = random(outputs, 4 * outputs)
    has_descriptors = torch.cuda.get_device_capability()[0] >= 9
    for rows, taken in ((32, False), (64, True), (96, False), (128, True), (129, False)):
        x = random(rows, 4 * outputs)
        assert shared_inputs.takes(x, weight) == (taken and has_descriptors)
        assert not shared_inputs.takes(x[:, : 3 * outputs], weight[:, : 3 * outputs])
        assert error(linear(x, weight, None), x.double() @ weight.double().T) < TOLERANCE


@pytest.mark.skipif(not ON_GPU, reason="narrow and wide rows take different ways on a GPU only")
@pytest.mark.parametrize("rows", [1, 16, 33, 64, 65, 128, 129, 300, 513, 2049])
def test_every_number_of_rows(rows: int) -> None:
    x, weight, added = random(rows, 4096) / 64, random(6144, 4096), random(rows, 6144)
    product = x.double() @ weight.double().T
    assert error(linear(x, weight, added), product + added.double()) < TOLERANCE
    gate, up = product.chunk(2, dim=-1)
    assert error(gated(x, weight), functional.silu(gate) * up) < TOLERANCE


HAS_FLOAT8 = ON_GPU and torch.cuda.get_device_capability() >= (8, 9)
"""Whether rows are put into float8. Triton's interpreter does not round to it properly: a mantissa
that is rounded up to 2 leaves the exponent as it is."""


def in_eight_bits(kind: Kind, outputs: int, inputs: int) -> tuple[EightBits, torch.Tensor]:
    """Return a random weight and what its bytes stand for."""
    bits = eight_bits(random(outputs, inputs), kind)
    return bits, bits.expanded().double()


def test_words_hold_consecutive_inputs_in_their_lower_and_upper_bytes() -> None:
    inputs = torch.arange(64, dtype=torch.int8).repeat(3, 1)
    words = interleave(inputs).view(torch.int16)
    assert torch.equal(words[:, :16] % 256, inputs[:, :16].short())
    assert torch.equal(words[:, 16:] // 256, inputs[:, 48:].short())
    assert torch.equal(in_order(interleave(inputs)), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_turned_into_itself(kind: Kind) -> None:
    bits, _ = in_eight_bits(kind, 1, 256)
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(bits.numbers.dtype)[None]
    every = every if kind == "int8" else torch.where(every.float().isnan(), 0, every)
    one = torch.ones(1, device=DEVICE)
    found = expanded(interleave(every), one, torch.float32)
    assert torch.equal(found, every.float())
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 48, 512), (5, 100, 96), (33, 70, 192)])
def test_a_product_with_eight_bits(kind: Kind, rows: int, outputs: int, inputs: int) -> None:
    bits, weight = in_eight_bits(kind, outputs, inputs)
    x = random(rows, inputs)
    for added in (None, random(outputs), random(rows, outputs)):
        expected = x.double() @ weight.T + (0 if added is None else added.double())
        got = _multiply(x, bits.numbers, added, bits.scales, gated=False)
        assert error(got, expected) < TOLERANCE
        assert error(linear(x, bits.numbers, added, bits.scales), expected) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 48, 512), (17, 100, 160)])
def test_a_gated_product_with_eight_bits(kind: Kind, rows: int, outputs: int, inputs: int) -> None:
    bits, weight = in_eight_bits(kind, 2 * outputs, inputs)
    x = random(rows, inputs)
    gate, up = (x.double() @ weight.T).chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    got = _multiply(x, bits.numbers, None, bits.scales, gated=True)
    assert error(got, expected) < TOLERANCE
    assert error(gated(x, bits.numbers, bits.scales), expected) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_take_a_wider_weight_a_band_at_a_time(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.many_rows._BAND", 32)
    bits, weight = in_eight_bits(kind, 80, 96)
    x = random(140, 96).float()  # as any rows where the device does not multiply float8
    for added in (None, random(80).float(), random(140, 80).float()):
        expected = x.double() @ weight.T + (0 if added is None else added.double())
        assert error(scaled_linear(x, bits.numbers, added, bits.scales), expected) < 1e-3
    assert error(expanded(bits.numbers, bits.scales, torch.float32), weight) < 1e-6


@pytest.mark.skipif(not HAS_FLOAT8, reason="needs a device that rounds to float8")
def test_rows_are_put_into_float8_each_by_its_own_scale() -> None:
    x = random(3, 224) * torch.tensor([[1e-3], [1.0], [1e3]], dtype=DTYPE, device=DEVICE)
    x[1] = 0
    numbers, scales = in_float8(x)
    found = in_order(numbers).double() * scales.double()
    assert (found[1] == 0).all()
    for row in (0, 2):
        assert numbers[row].float().abs().max() == 448
        assert error(found[row], x[row].double()) < 0.04


@pytest.mark.skipif(not ON_GPU, reason="few and many rows take different ways on a GPU only")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 33, 128, 129, 300])
def test_every_number_of_rows_with_eight_bits(kind: Kind, rows: int) -> None:
    """Rows in float8 as well, as where many of them meet such a weight, round to 3 bits."""
    bits, weight = in_eight_bits(kind, 6144, 4096)
    x, added = random(rows, 4096) / 64, random(rows, 6144)
    rounds = HAS_FLOAT8 and kind == "float8" and rows > _MOST_ROWS_OF_EIGHT_BITS
    allowed = 0.05 if rounds else TOLERANCE
    product = x.double() @ weight.T
    got = linear(x, bits.numbers, added, bits.scales)
    assert error(got, product + added.double()) < allowed
    gate, up = product.chunk(2, dim=-1)
    assert error(gated(x, bits.numbers, bits.scales), functional.silu(gate) * up) < 2 * allowed
