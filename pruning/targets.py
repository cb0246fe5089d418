"""What can be dropped: attention sublayers, MLP sublayers, whole layers, or both kinds together.

Attention is what this project is about. The others are the paper's baselines (He et al., arXiv
2406.15786), measured and served by the same commands. Pure data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ATTENTION, MLP, BLOCK, JOINT = "attention", "mlp", "block", "joint"

TARGETS = (ATTENTION, MLP, BLOCK, JOINT)
"""What a step of a ranking drops: a layer's attention, its MLP, both, or (joint) one of the two."""

JOINED = (ATTENTION, MLP)
"""The sublayers that a joint ranking is made of."""


@dataclass(frozen=True, slots=True)
class Sublayers:
    """Sublayers of a model: the attention of some layers and the MLPs of some."""

    attention: frozenset[int] = frozenset()
    mlps: frozenset[int] = frozenset()

    def __or__(self, other: Sublayers) -> Sublayers:
        return Sublayers(self.attention | other.attention, self.mlps | other.mlps)

    def __sub__(self, other: Sublayers) -> Sublayers:
        return Sublayers(self.attention - other.attention, self.mlps - other.mlps)


NO_SUBLAYERS = Sublayers()


def attention_of(layers: Iterable[int]) -> Sublayers:
    """Return the attention of some layers."""
    return Sublayers(attention=frozenset(layers))


def sublayers_of(target: str, layer: int) -> Sublayers:
    """Return what is dropped of a layer: for `attention`, `mlp` or `block`."""
    one = frozenset({layer})
    return Sublayers(
        one if target in (ATTENTION, BLOCK) else frozenset(),
        one if target in (MLP, BLOCK) else frozenset(),
    )
