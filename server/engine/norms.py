"""RMSNorm on a CPU: which norms have its form, and a model's last one as one native call.

A layer's norms are part of its compiled functions. The last one stands alone: torch takes eight
operators for it, which for a few rows are little but overhead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.native import NativeFunctions

_OFFSETS = (0.0, 1.0)
"""What is added to a norm's weight: nothing, or 1 as in Gemma."""


@dataclass(frozen=True, slots=True)
class RootMeanSquare:
    """`gain * x / sqrt(mean(x^2) + epsilon)`, or nothing at all where there is no gain."""

    gain: Tensor | None
    """float32 [width]"""
    epsilon: float


@torch.no_grad()
def root_mean_square(norm: nn.Module) -> RootMeanSquare | None:
    """Return the form of a norm by what it does to numbers, half of them so small that epsilon
    decides; None where it is another one."""
    if isinstance(norm, nn.Identity):
        return RootMeanSquare(None, 0.0)
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return None
    numbers = torch.linspace(-2.0, 3.0, weight.numel())
    probe = torch.stack([numbers, numbers * epsilon**0.5])
    expected = probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + epsilon)
    given = copy.deepcopy(norm).float()(probe)  # some take no others than their weight's
    for offset in _OFFSETS:
        gain = weight.detach().float() + offset
        if torch.allclose(given, expected * gain, rtol=1e-4, atol=1e-5):
            return RootMeanSquare(gain, epsilon)
    return None


def use_native_norm(model: PreTrainedModel, native: NativeFunctions) -> None:
    """Let the native function compute a model's last norm, if it has the form."""
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    form = root_mean_square(decoder.norm)
    if form is not None and form.gain is not None:
        decoder.norm = NativeNorm(decoder.norm, form.gain, form.epsilon, native)


class NativeNorm(nn.Module):
    """A norm of numbers in bfloat16; others are left to the module that it stands for."""

    def __init__(
        self, exact: nn.Module, gain: Tensor, epsilon: float, native: NativeFunctions
    ) -> None:
        super().__init__()
        self.exact = exact
        self.gain, self.epsilon, self._native = gain, epsilon, native

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.dtype != torch.bfloat16:
            return self.exact(hidden)  # type: ignore[no-any-return]
        return self._native.norm(hidden, self.gain, self.epsilon)
