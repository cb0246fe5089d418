"""Substitutes on a CPU: what stands in a dropped sublayer's place, as one native call for few rows.

    hidden --> norm --> map in eight bits, or two of low rank --> + bias, x multiplier --> + hidden

Between torch's operators for these, Python takes longer than their work. Knows which norms the
native function computes; sublayers with another one stay as they are, and so do steps of many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.quantised import EightBitSubstitute
from pruning.sublayers import AttentionSublayer
from server.engine.native import MAP_ROWS, NativeFunctions, NormedMap, TiledMap

_OFFSETS = (0.0, 1.0)
"""What is added to a norm's weight: nothing, or 1 as in Gemma."""


@dataclass(frozen=True, slots=True)
class _RootMeanSquare:
    """`gain * x / sqrt(mean(x^2) + epsilon)`, or nothing at all where there is no gain."""

    gain: Tensor | None
    """float32 [width]"""
    epsilon: float


def use_native(sublayers: Iterable[AttentionSublayer], native: NativeFunctions) -> None:
    """Let the native function compute the substitutes in eight bits for few rows.

    Their levels are kept once, as it reads them; steps of many rows compute by the exact maps.
    """
    for sublayer in sublayers:
        substitute = sublayer.substitute
        norm = _root_mean_square(sublayer.norm)
        if isinstance(substitute, EightBitSubstitute) and norm is not None:
            sublayer.substitute = substitute.exact
            sublayer.replace_by(_replacing(sublayer, substitute, norm, native))


def _replacing(
    sublayer: AttentionSublayer,
    substitute: EightBitSubstitute,
    norm: _RootMeanSquare,
    native: NativeFunctions,
) -> Callable[[Tensor], Tensor]:
    """Return what computes a sublayer's rows that do not attend."""
    exact = substitute.exact
    held = NormedMap(
        norm.gain,
        norm.epsilon,
        sublayer.multiplier,
        tuple(TiledMap.of(*each) for each in substitute.maps),
        exact.bias.detach().float(),
    )
    address = held.address()

    def replaced(hidden: Tensor, _held: NormedMap = held) -> Tensor:
        if 0 < hidden.shape[1] <= MAP_ROWS:
            return native.substitute(hidden, address)
        return sublayer.replaced(hidden, exact)

    return replaced


@torch.no_grad()
def _root_mean_square(norm: nn.Module) -> _RootMeanSquare | None:
    """Return the form of a norm by what it does to numbers, half of them so small that epsilon
    decides; None where it is another one."""
    if isinstance(norm, nn.Identity):
        return _RootMeanSquare(None, 0.0)
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return None
    numbers = torch.linspace(-2.0, 3.0, weight.numel())
    probe = torch.stack([numbers, numbers * epsilon**0.5])
    expected = probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + epsilon)
    given = norm(probe)
    for offset in _OFFSETS:
        gain = weight.detach().float() + offset
        if torch.allclose(given, expected * gain, rtol=1e-4, atol=1e-5):
            return _RootMeanSquare(gain, epsilon)
    return None
