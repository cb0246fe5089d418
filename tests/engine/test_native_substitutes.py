"""Substitutes by native code against the same maps in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pruning.attention import CausalAttention
from pruning.quantised import EightBitSubstitute, runs_here
from pruning.sublayers import AttentionSublayer, wrap
from pruning.substitutes import LinearSubstitute
from server.engine.native import MAP_ROWS, NativeFunctions, NormedMap, TiledMap
from server.engine.substitutes import use_native
from tests.pruning.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(
    not runs_here(torch.device("cpu")), reason="the functions need AVX-512"
)

FAMILIES = ["llama", "qwen2", "phi3", "gemma2", "gemma3_text", "olmo2", "granite"]
ROUNDED = 2**-8


@pytest.fixture(scope="module")
def native(native_of_this_processor: NativeFunctions) -> NativeFunctions:
    return native_of_this_processor


def random_substitute(width: int, rank: int | None) -> LinearSubstitute:
    torch.manual_seed(width)
    if rank is None:
        return LinearSubstitute(torch.randn(width, width) / width**0.5, torch.randn(width))
    weight, down = torch.randn(width, rank) / rank**0.5, torch.randn(rank, width) / width**0.5
    return LinearSubstitute(weight, torch.randn(width), down)


def sublayer_of(family: str, width: int, rank: int | None) -> AttentionSublayer:
    """Return a sublayer with a substitute in eight bits, and a norm whose weights differ."""
    sublayer = wrap(tiny_model(family, layers=1).bfloat16())[0]
    if not isinstance(sublayer.norm, nn.Identity):
        sublayer.norm = type(sublayer.norm)(width, eps=0.01)
        sublayer.norm.weight.data = (torch.rand(width) + 0.5).bfloat16()
    sublayer.substitute = EightBitSubstitute(random_substitute(width, rank).bfloat16())
    return sublayer


@torch.no_grad()
def in_float64(sublayer: AttentionSublayer, hidden: Tensor) -> Tensor:
    """Return what the substitute leaves of hidden states, with its maps in eight bits."""
    substitute = sublayer.substitute
    assert isinstance(substitute, EightBitSubstitute)
    numbers = sublayer.norm(hidden.float()).double()
    for levels, scales in substitute.maps:
        numbers = numbers @ (levels.double() * scales.double()[:, None]).T
    return hidden.double() + sublayer.multiplier * (numbers + substitute.exact.bias.double())


@torch.inference_mode()
def dropped_rows(sublayer: AttentionSublayer, hidden: Tensor, attending: int = 0) -> Tensor:
    """Return the rows of a forward pass that do not attend."""
    cos = torch.ones(1, hidden.shape[1], 8, dtype=hidden.dtype)
    output = sublayer(
        hidden,
        attending,
        position_embeddings=(cos, torch.zeros_like(cos)),
        attend=CausalAttention(),
        layer=0,
    )
    return output[:, attending:]  # type: ignore[no-any-return]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def hold_equal(sublayer: AttentionSublayer, hidden: Tensor, native: NativeFunctions) -> None:
    """Hold the native function equal to float64, and no worse than operators one by one."""
    expected, plain = in_float64(sublayer, hidden), dropped_rows(sublayer, hidden)
    use_native([sublayer], native)
    assert isinstance(sublayer.substitute, LinearSubstitute), "the native function is used"
    got = dropped_rows(sublayer, hidden)
    assert got.dtype == torch.bfloat16
    assert error(got, expected) < min(ROUNDED, 1.01 * error(plain, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_norm_and_multiplier(native: NativeFunctions, family: str) -> None:
    """Of hidden states so small that a norm's epsilon matters, and large ones."""
    hidden = torch.randn(1, 3, 32) * torch.tensor([0.02, 1.0, 50.0])[:, None]
    hold_equal(sublayer_of(family, 32, None), hidden.bfloat16(), native)


@pytest.mark.parametrize("rows", range(1, MAP_ROWS + 1))
@pytest.mark.parametrize(("width", "rank"), [(96, None), (224, None), (96, 7), (224, 160)])
def test_maps_of_any_shape(
    native: NativeFunctions, width: int, rank: int | None, rows: int
) -> None:
    """Of one tile and many, on one thread and on several."""
    hold_equal(sublayer_of("llama", width, rank), torch.randn(1, rows, width).bfloat16(), native)


@pytest.mark.parametrize("rows", range(1, MAP_ROWS + 1))
@pytest.mark.parametrize("rank", [None, 160])
def test_maps_without_products_of_bfloat16(
    native_of_avx512_alone: NativeFunctions, rank: int | None, rows: int
) -> None:
    hidden = torch.randn(1, rows, 224).bfloat16()
    hold_equal(sublayer_of("llama", 224, rank), hidden, native_of_avx512_alone)


def test_every_level_is_multiplied_exactly(native: NativeFunctions) -> None:
    """By the greatest and the least of eight bits and all between, in places of their own."""
    width = 256
    levels = torch.arange(width).sub(128).to(torch.int8).diag()
    scales = torch.ones(width)
    held = NormedMap(None, 0.0, 1.0, (TiledMap.of(levels, scales),), torch.zeros(width))
    address = held.address()
    for rows in range(1, MAP_ROWS + 1):
        hidden = torch.randint(-1, 2, (1, rows, width)).bfloat16()
        expected = hidden + (hidden.double() @ levels.double().T).bfloat16()
        assert torch.equal(native.substitute(hidden, address), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_attending_rows_come_first(native: NativeFunctions, family: str) -> None:
    """Only the rows beyond the prefix are replaced, and the prefix attends as before."""
    sublayer = sublayer_of(family, 32, 5)
    hidden = torch.randn(1, 7, 32).bfloat16()
    expected, before = in_float64(sublayer, hidden), dropped_rows(sublayer, hidden, 3)
    use_native([sublayer], native)
    got = dropped_rows(sublayer, hidden, 3)
    assert error(got, expected[:, 3:]) < ROUNDED
    assert error(got, before) < 4 * ROUNDED


def test_many_rows_compute_by_the_exact_maps(native: NativeFunctions) -> None:
    sublayer = sublayer_of("llama", 96, None)
    hidden = torch.randn(1, MAP_ROWS + 1, 96).bfloat16()
    plain = dropped_rows(sublayer, hidden)
    use_native([sublayer], native)
    assert torch.equal(dropped_rows(sublayer, hidden), plain)


class Recentred(nn.Module):
    """A norm that native code does not know, though it has what others have."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.weight, self.eps = norm, norm.weight, 0.01

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden - hidden.mean())  # type: ignore[no-any-return]


def test_another_norm_stays_as_it_is(native: NativeFunctions) -> None:
    sublayer = sublayer_of("llama", 96, None)
    sublayer.norm = Recentred(sublayer.norm)
    hidden = 2 + torch.randn(1, 2, 96).bfloat16()
    plain = dropped_rows(sublayer, hidden)
    use_native([sublayer], native)
    assert isinstance(sublayer.substitute, EightBitSubstitute)
    assert torch.equal(dropped_rows(sublayer, hidden), plain)


def test_sublayers_without_substitutes_pass_rows_through(native: NativeFunctions) -> None:
    sublayer = wrap(tiny_model("llama", layers=1))[0]
    use_native([sublayer], native)
    hidden = torch.randn(1, 2, 32)
    assert torch.equal(dropped_rows(sublayer, hidden), hidden)
