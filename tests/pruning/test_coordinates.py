"""What a substitute is trained in: where it begins, what a step means, what comes out."""

from __future__ import annotations

import pytest
import torch

from pruning.coordinates import InputStatistics, Trainee
from pruning.substitutes import LinearSubstitute

WIDTH, RANK = 16, 3


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> InputStatistics:
    """Of inputs whose directions spread very unequally, and whose mean is far from zero."""
    directions = torch.linalg.qr(randn(WIDTH, WIDTH, seed=2).double()).Q
    variances = torch.logspace(-1, 2, WIDTH, dtype=torch.float64)
    covariance = directions * variances @ directions.T
    return InputStatistics(3 * randn(WIDTH, seed=3).double(), covariance)


def start(low: bool) -> LinearSubstitute:
    if not low:
        return LinearSubstitute(randn(WIDTH, WIDTH), randn(WIDTH, seed=4))
    return LinearSubstitute(randn(WIDTH, RANK), randn(WIDTH, seed=4), randn(RANK, WIDTH, seed=5))


@pytest.fixture(params=[False, True], ids=["full", "low"])
def moved(request) -> tuple[Trainee, LinearSubstitute]:
    """A trainee that has moved, and where it began."""
    begun = start(request.param)
    trainee = Trainee(begun, inputs())
    with torch.no_grad():
        for index, part in enumerate(trainee.parameters()):
            part += randn(*part.shape, seed=10 + index)
    return trainee, begun


@pytest.mark.parametrize("low", [False, True])
def test_it_begins_as_what_it_is_given(low):
    begun = start(low)
    folded = Trainee(begun, inputs()).folded(torch.float32)
    for name, part in begun.named_parameters():
        assert torch.equal(dict(folded.named_parameters())[name], part)


def test_what_comes_out_computes_the_same(moved):
    trainee, _ = moved
    x = 10 * randn(7, WIDTH, seed=6)
    folded = trainee.folded(torch.float64)
    expected = trainee(x).double()
    torch.testing.assert_close(folded(x.double()), expected, rtol=1e-4, atol=1e-3)


def test_only_the_bias_moves_the_output_at_the_mean(moved):
    trainee, begun = moved
    mean = inputs().mean.float()[None]
    shift = trainee.weight.spread * trainee.bias_delta
    torch.testing.assert_close(trainee(mean), begun(mean) + shift, rtol=1e-4, atol=1e-3)


def test_a_step_moves_every_output_by_a_share_of_its_spread():
    """A correction with entries of one size changes an output by that share of its deviation,
    whatever the inputs' spread."""
    statistics, begun = inputs(), start(low=False)
    trainee = Trainee(begun, statistics)
    signs = randn(WIDTH, WIDTH, seed=7).sign()
    with torch.no_grad():
        trainee.weight.delta += 0.25 * signs
    change = (trainee.weight.change()).double()
    deviation = (change @ statistics.covariance * change).sum(1).sqrt()
    weight = begun.weight.double()
    spread = (weight @ statistics.covariance * weight).sum(1).sqrt()
    torch.testing.assert_close(
        deviation / spread, torch.full((WIDTH,), 0.25).double(), rtol=0.02, atol=0
    )
