"""Four-bit weights in groups of 32 for the decoder layers of a model on a CPU.

A group stores one scale and one minimum for 32 inputs of an output: w = q * scale + minimum with q
from 0 to 15. Weights that lie on such a grid already, as those of a GGUF file of type Q4_0 or Q4_1
do after they were expanded, are found again without a second rounding; any other weight is rounded
to the nearest of 16 values between its group's least and greatest.

Products of few rows are bound by reading the weights, and run on four bits; for more rows a copy in
bfloat16 is faster. Activations are bfloat16. Like projections.py, this replaces parts of a
transformers model; it is shared by all variants, and the plan does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

GROUP = 32
"""Inputs that share a scale and a minimum."""
_LEVELS = 15
_OUTPUTS = 16
"""torch packs outputs in multiples of this."""
_FEW_ROWS = 12
"""Measured with SmolLM2-135M: 20 ms for all weights at 12 rows, 22 in bfloat16; 6 at one row."""
_EXACT = 1e-6


class QuantisationError(ValueError):
    """The weights cannot be served in four bits here."""


@dataclass(frozen=True, slots=True)
class FourBits:
    """A weight [outputs, inputs] on its grid."""

    levels: Tensor
    """[outputs, inputs] uint8, 0 to 15."""
    scales: Tensor
    """[outputs, inputs / GROUP] float32."""
    minima: Tensor
    """[outputs, inputs / GROUP] float32."""

    def expanded(self) -> Tensor:
        """Return the weight in float32."""
        levels = _grouped(self.levels).float()
        return (levels * self.scales[..., None] + self.minima[..., None]).flatten(1)


class FourBitLinear(nn.Module):
    """A linear layer on a weight in four bits."""

    packed: Tensor
    scales_and_zeros: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, bits: FourBits, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = bits.levels.shape
        # torch's kernel computes (q - 8) * scale + zero.
        zeros = bits.minima + 8 * bits.scales
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(bits.levels.int(), 1)
        both = torch.stack([bits.scales, zeros], -1).transpose(0, 1).contiguous()
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", both.bfloat16())
        self.register_buffer("weight", bits.expanded().bfloat16())
        self.register_buffer("bias", None if bias is None else bias.bfloat16())

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if rows.shape[0] > _FEW_ROWS:
            return functional.linear(inputs, self.weight, self.bias)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.packed, GROUP, self.scales_and_zeros
        )
        out = out.reshape(*inputs.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def four_bits(weight: Tensor) -> FourBits:
    """Put a weight [outputs, inputs] on the grid between each group's least and greatest value."""
    groups = _grouped(weight.float())
    minima, greatest = groups.amin(-1), groups.amax(-1)
    scales = (greatest - minima) / _LEVELS
    steps = torch.where(scales > 0, scales, 1.0)
    levels = ((groups - minima[..., None]) / steps[..., None]).round().clamp(0, _LEVELS)
    return FourBits(levels.flatten(1).to(torch.uint8), scales, minima)


def is_on_grid(model: PreTrainedModel) -> bool:
    """Whether four bits hold the weights of every decoder layer as they are."""
    return all(_fits(linear) and _error(linear.weight) < _EXACT for _, _, linear in _linears(model))


def runs_here(device: torch.device) -> bool:
    """Whether this machine has the instructions that make four bits faster."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


@torch.no_grad()
def quantise(model: PreTrainedModel) -> None:
    """Put the decoder layers' weights into four bits and all others into bfloat16, in place.

    Raises:
        QuantisationError: the model is not on a CPU, or a weight's shape does not fit.
    """
    if model.device.type != "cpu":
        raise QuantisationError(f"int4 runs on a CPU; this model is on {model.device.type}")
    for parent, name, linear in list(_linears(model)):
        if not _fits(linear):
            raise QuantisationError(
                f"int4 needs inputs in multiples of {GROUP} and outputs in multiples of "
                f"{_OUTPUTS}; {name} has {linear.in_features} and {linear.out_features}"
            )
        setattr(parent, name, FourBitLinear(four_bits(linear.weight), linear.bias))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def _linears(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the linear layers of every decoder layer, with their parents and names there."""
    for layer in model.get_decoder().layers:  # type: ignore[no-untyped-call]
        for parent in layer.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    yield parent, name, child


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % GROUP == 0 and linear.out_features % _OUTPUTS == 0


def _error(weight: Tensor) -> float:
    """Return how far four bits are from a weight, relative to its norm."""
    exact = weight.detach().float()
    return float((four_bits(exact).expanded() - exact).norm() / exact.norm())


def _grouped(weight: Tensor) -> Tensor:
    """Return [outputs, inputs] as [outputs, groups, GROUP]."""
    return weight.unflatten(1, (-1, GROUP))  # type: ignore[no-untyped-call,no-any-return]
