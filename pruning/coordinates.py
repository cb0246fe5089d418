"""Coordinates: how a substitute is parametrised while it is trained.

Its normed inputs have directions of very unequal spread. A step of the same size in every weight
would be far too long in some of them and idle in others. So what is trained is a correction D to
the map M it began with, in coordinates in which inputs have unit covariance, and every output is
measured by its own spread::

    M = M0 + diag(s) D P / sqrt(inputs)         P = (Cov(x) + ridge I)^-1/2,  s = std(M0 x)
    bias = bias0 + s d - (M - M0) mean(x)

D = 0 is what training began with, and a learning rate means the same in every layer and model. In
the end D is folded into an ordinary substitute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.substitutes import LinearSubstitute

_RIDGE = 1e-4
"""As a multiple of the mean variance of an input."""
_SMALLEST_SPREAD = 0.1
"""Of an output, as a multiple of the root mean square of all: none is left untrained."""


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """Of the normed inputs of one dropped sublayer, in float64."""

    mean: Tensor
    """[width]."""
    covariance: Tensor
    """[width, width]."""


class _Correction(nn.Module):
    """A matrix [outputs, inputs] that is trained in the coordinates of its inputs."""

    def __init__(self, start: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(start, dtype=torch.float32))
        spread = (start.double() @ covariance * start.double()).sum(1).clamp(min=0).sqrt()
        smallest = _SMALLEST_SPREAD * spread.square().mean().sqrt()
        spread = spread.clamp(min=float(smallest.clamp(min=torch.finfo(torch.float32).tiny)))
        self.start: Tensor
        self.root: Tensor
        self.spread: Tensor
        self.register_buffer("start", start.float())
        self.register_buffer("root", (_inverse_root(covariance) / len(covariance) ** 0.5).float())
        self.register_buffer("spread", spread.float())

    def change(self) -> Tensor:
        """Return M - M0."""
        return self.spread[:, None] * (self.delta @ self.root)


class Trainee(nn.Module):
    """A substitute that is being trained; stands in its sublayer's place."""

    def __init__(self, start: LinearSubstitute, inputs: InputStatistics) -> None:
        """start is where training begins; everything lies on the device of the statistics."""
        super().__init__()
        device = inputs.mean.device
        weight = start.weight.detach().to(device)
        covariance = inputs.covariance
        self.down: _Correction | None = None
        if start.down is not None:
            down = start.down.detach().to(device)
            self.down = _Correction(down, covariance)
            covariance = down.double() @ covariance @ down.double().T
        self.weight = _Correction(weight, covariance)
        self.bias_delta = nn.Parameter(torch.zeros(len(weight), device=device))
        self.bias: Tensor
        self.mean: Tensor
        self.register_buffer("bias", start.bias.detach().float().to(device))
        self.register_buffer("mean", inputs.mean.float())

    def forward(self, normed: Tensor) -> Tensor:
        weight, bias, down = self._composed()
        if down is not None:
            normed = functional.linear(normed, down)
        return functional.linear(normed, weight, bias)

    @torch.no_grad()
    def folded(self, dtype: torch.dtype) -> LinearSubstitute:
        """Return the substitute as it is now."""
        weight, bias, down = self._composed()
        return LinearSubstitute(
            weight.to(dtype), bias.to(dtype), None if down is None else down.to(dtype)
        )

    def _composed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weight, bias and down, in float32 whatever surrounds it."""
        with torch.autocast(self.mean.device.type, enabled=False):
            change = self.weight.change()
            weight = self.weight.start + change
            if self.down is None:
                moved, down = change @ self.mean, None
            else:
                turned = self.down.change()
                down = self.down.start + turned
                moved = change @ (down @ self.mean) + self.weight.start @ (turned @ self.mean)
            bias = self.bias + self.weight.spread * self.bias_delta - moved
        return weight, bias, down


def _inverse_root(covariance: Tensor) -> Tensor:
    """Return (covariance + ridge I)^-1/2, symmetric."""
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(covariance)
    ridge = _RIDGE * values.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return vectors / (values.clamp(min=0) + ridge).sqrt() @ vectors.T
