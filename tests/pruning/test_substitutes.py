"""Closed-form substitutes: the fit against one stacked least-squares problem, and the file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from pruning.substitutes import (
    RIDGES,
    LinearSubstitute,
    SubstituteError,
    SubstituteKind,
    Substitutes,
    fit_linear,
    parse_substitutes,
)
from tests.pruning.tiny_models import tiny_base
from tests.reference.divergence import least_squares

WIDTH = 12
FULL_RANK = SubstituteKind(None)


def pairs(rows: int = 400, noise: float = 0.3, rank: int = WIDTH) -> list[torch.Tensor]:
    """Inputs of very unequal spread with a mean, and a noisy affine map of them."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = randn(rows, WIDTH) * torch.logspace(-1, 1, WIDTH) @ randn(WIDTH, WIDTH) + randn(WIDTH)
    y = x @ randn(WIDTH, rank) @ randn(rank, WIDTH) / WIDTH + 2 * randn(WIDTH)
    return [x, y + noise * randn(rows, WIDTH)]


def batches(x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(x.split(80), y.split(80), strict=True))


def error(substitute: LinearSubstitute, x: torch.Tensor, y: torch.Tensor) -> float:
    return (substitute(x) - y).square().sum(-1).mean().item()


def test_the_fit_is_the_least_squares_map_whose_ridge_predicts_other_rows_best():
    x, y = pairs(rows=60, noise=30.0)
    chooses = torch.arange(len(x)) % 20 >= 15  # the last quarter of each batch of 20
    errors = []
    for ridge in RIDGES:
        weight, bias = least_squares(x[~chooses], y[~chooses], ridge)
        predicted = x[chooses].double() @ weight.T + bias
        errors.append((predicted - y[chooses]).square().sum().item())
    best = errors.index(min(errors))
    assert 0 < best < len(RIDGES), "the test is blind"
    found = fit_linear(zip(x.split(20), y.split(20), strict=True), FULL_RANK, torch.float64)
    weight, bias = least_squares(x, y, RIDGES[best])
    torch.testing.assert_close(found.weight.data, weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.bias.data, bias, rtol=1e-6, atol=1e-7)


def test_a_map_that_is_linear_is_found():
    x, y = pairs(noise=0.0, rank=3)
    for kind in (FULL_RANK, SubstituteKind(3), SubstituteKind(WIDTH)):
        substitute = fit_linear(batches(x, y), kind, torch.float32)
        assert error(substitute, x, y) < 1e-3 * y.var(0).sum()


def test_a_bounded_rank_keeps_what_the_inputs_make_matter():
    x, y = pairs(noise=0.0)
    whole = fit_linear(batches(x, y), FULL_RANK, torch.float64)
    left, values, right = torch.linalg.svd(whole.weight.data)
    errors = []
    for rank in (2, 4, 8):
        found = fit_linear(batches(x, y), SubstituteKind(rank), torch.float64)
        assert (found.down.shape, found.weight.shape) == ((rank, WIDTH), (WIDTH, rank))
        plain = (left[:, :rank] * values[:rank]) @ right[:rank]
        unweighted = LinearSubstitute(plain, y.double().mean(0) - plain @ x.double().mean(0))
        errors.append(error(found, x.double(), y.double()))
        assert errors[-1] <= error(unweighted, x.double(), y.double())
    assert errors == sorted(errors, reverse=True)


def test_inputs_that_hardly_vary_give_a_finite_map():
    x = torch.ones(80, WIDTH)
    substitute = fit_linear([(x, 3 * x)], FULL_RANK, torch.float32)
    torch.testing.assert_close(substitute(x), 3 * x)


def test_numbers_that_are_not_finite_are_refused():
    x, y = pairs()
    x[3, 3] = float("nan")
    with pytest.raises(SubstituteError, match="load the model with --dtype"):
        fit_linear(batches(x, y), FULL_RANK, torch.float32)
    x, y = pairs()
    with pytest.raises(SubstituteError, match="a substitute is not finite"):
        fit_linear(batches(x, y * 1e6), FULL_RANK, torch.float16)


@pytest.mark.parametrize("text", ["linear:0", "linear:", "linear:-1", "Linear", "", "linear:1e3"])
def test_kinds_that_are_none(text):
    with pytest.raises(SubstituteError, match="substitutes must be 'none', 'linear', or"):
        parse_substitutes(text)


def test_kinds():
    assert parse_substitutes("none") is None
    assert [str(parse_substitutes(text)) for text in ("linear", "linear:64")] == [
        "linear",
        "linear:64",
    ]


def some(width: int = 32) -> Substitutes:
    torch.manual_seed(1)
    return Substitutes(
        {
            3: LinearSubstitute(torch.randn(width, width), torch.randn(width)),
            1: LinearSubstitute(torch.randn(width, 2), torch.randn(width), torch.randn(2, width)),
        }
    )


class TestFile:
    def test_round_trip(self, tmp_path):
        written = some()
        written.write(tmp_path / "a.safetensors")
        read = Substitutes.read(tmp_path / "a.safetensors")
        assert read.fingerprint == written.fingerprint
        for layer, each in written.by_layer.items():
            x = torch.randn(4, 32)
            assert torch.equal(each(x), read.by_layer[layer](x))

    def test_the_fingerprint_covers_content_and_place(self):
        first = some()
        moved = Substitutes({2: first.by_layer[3], 1: first.by_layer[1]})
        changed = some()
        changed.by_layer[3].bias.data[0] += 1
        assert len({first.fingerprint, moved.fingerprint, changed.fingerprint}) == 3

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"layers.1.weight": torch.ones(4, 4)}, "a substitute is a weight"),
            ({"layers.1.weight": torch.ones(4, 3), "layers.1.bias": torch.ones(4)}, "shapes"),
            ({"layers.1.weight": torch.ones(4, 4), "layers.1.bias": torch.tensor(1.0)}, "shapes"),
            ({"layers.x.bias": torch.ones(4)}, "'layers.x.bias', which is no part"),
            ({"layers.1.bias": torch.ones(4, dtype=torch.int64)}, "which is no part"),
            ({"model.embed": torch.ones(4)}, "which is no part"),
        ],
    )
    def test_files_that_hold_something_else(self, tmp_path, tensors, message):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(SubstituteError, match=message):
            Substitutes.read(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"{}"])
    def test_files_that_are_damaged(self, tmp_path, content):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(SubstituteError, match="cannot read substitutes"):
            Substitutes.read(tmp_path / "a.safetensors")


class TestAttach:
    def test_the_given_layers_get_them_in_the_models_type(self):
        base = tiny_base()
        base.model.double()
        some().attach(base, [3])
        assert base.sublayers[3].substitute.weight.dtype is torch.float64
        assert base.sublayers[1].substitute is None

    def test_size_counts_the_given_layers(self):
        assert some().size([3]) == (32 * 32 + 32, 4 * (32 * 32 + 32))
        assert some().size([1, 3])[0] == 32 * 32 + 32 + 2 * 2 * 32 + 32

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(SubstituteError, match="no substitute for layer 2"):
            some().attach(tiny_base(), [2])
        with pytest.raises(SubstituteError, match="is for a width of 16, but tiny has 32"):
            some(16).attach(tiny_base(), [3])
