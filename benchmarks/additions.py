"""Additions: what a pruned model could have of its own in the sublayers that it keeps.

For measuring only; no server has them. They are put into copies of a model's layers, whose weights
stay the base model's own and frozen, and are nothing to begin with::

    scales      norm(h) * (1 + s)            of attention that is kept, and of every MLP
    attention   project(x) + x D^T U^T       of every projection of attention that is kept
    mlps        mlp(x) + x D^T U^T + b       of every MLP: the form of a low-rank substitute
    weights     the layers' weights          trained themselves, in copies that share nothing

s, U and b begin as zero and D as random directions, so that D x is about as large as x. Embeddings,
last norm and head stay the base model's everywhere: the loss is the same function for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.loading import BaseModel
from pruning.sublayers import AttentionSublayer, MlpSublayer, WrappedLayer

MAPS = "maps"
WEIGHTS = "weights"


class Scaled(nn.Module):
    """A norm whose output is multiplied, channel by channel."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = norm
        self.delta = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) * (1 + self.delta)  # type: ignore[no-any-return]


class Beside(nn.Module):
    """A module, and a low-rank map of the same input that is added to its output."""

    def __init__(self, module: nn.Module, down: Tensor, outputs: int, *, bias: bool) -> None:
        """down is [rank, inputs]."""
        super().__init__()
        self.module = module
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(outputs, len(down)))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        added = functional.linear(functional.linear(inputs, self.down), self.up, self.bias)
        return self.module(inputs) + added  # type: ignore[no-any-return]


class _Adder:
    """Puts additions into copied layers."""

    def __init__(self, base: BaseModel, dropped: Collection[int], rank: int, seed: int) -> None:
        self._width = int(base.model.config.get_text_config().hidden_size)
        self._dropped = dropped
        self._rank = rank
        self._generator = torch.Generator().manual_seed(seed)

    def scales(self, layers: Sequence[WrappedLayer]) -> None:
        for index, layer in enumerate(layers):
            if index not in self._dropped:
                self._scale(layer.attention)
            self._scale(layer.mlp)

    def attention(self, layers: Sequence[WrappedLayer]) -> None:
        for index, layer in enumerate(layers):
            if index in self._dropped:
                continue
            attention = layer.attention.attention
            for name, part in list(attention.named_children()):
                if isinstance(part, nn.Linear):
                    down = self._directions(part.in_features)
                    setattr(attention, name, Beside(part, down, part.out_features, bias=False))

    def mlps(self, layers: Sequence[WrappedLayer]) -> None:
        for layer in layers:
            down = self._directions(self._width)
            layer.mlp.mlp = Beside(layer.mlp.mlp, down, self._width, bias=True)

    def weights(self, layers: Sequence[WrappedLayer]) -> None:
        for index, layer in enumerate(layers):
            layer.requires_grad_(True)
            if index in self._dropped:  # its norm is the substitute's
                layer.attention.attention.requires_grad_(False)
                layer.attention.post_norm.requires_grad_(False)

    def _scale(self, sublayer: AttentionSublayer | MlpSublayer) -> None:
        """Scale what the sublayer has of norms: before, after, or both."""
        if not isinstance(sublayer.norm, nn.Identity):
            sublayer.norm = Scaled(sublayer.norm, self._width)
        if not isinstance(sublayer.post_norm, nn.Identity):
            sublayer.post_norm = Scaled(sublayer.post_norm, self._width)

    def _directions(self, inputs: int) -> Tensor:
        return torch.randn(self._rank, inputs, generator=self._generator).div_(inputs**0.5)


_Change = Callable[[_Adder, Sequence[WrappedLayer]], None]
SETS: Mapping[str, tuple[_Change, ...]] = {
    MAPS: (),
    "maps+scales": (_Adder.scales,),
    "maps+attention": (_Adder.attention,),
    "maps+mlps": (_Adder.mlps,),
    "maps+all": (_Adder.attention, _Adder.mlps),
    WEIGHTS: (_Adder.weights,),
}
"""What is trained beside the maps in dropped sublayers' places, by the name of the set."""


@dataclass(frozen=True, slots=True, eq=False)
class Student:
    """What a pruned model has of its own beside its substitutes."""

    layers: Sequence[WrappedLayer] | None
    """All its layers; None: they are the base model's."""
    parts: Mapping[str, nn.Parameter]
    """What is trained of them, by name."""


def student(
    base: BaseModel, dropped: Collection[int], name: str, *, rank: int, seed: int
) -> Student:
    """Return the pruned model of a set, which computes what it would without additions.

    Args:
        dropped: layers whose attention is dropped.
        rank: of every low-rank map.
        seed: of their directions.
    """
    changes = SETS[name]
    if not changes:
        return Student(None, {})
    layers = _copied(base, shared=name != WEIGHTS)
    adder = _Adder(base, dropped, rank, seed)
    for change in changes:
        change(adder, layers)
    for layer in layers:
        layer.to(base.device)
    parts = {
        f"own.{index}.{part}": parameter
        for index, layer in enumerate(layers)
        for part, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    return Student(layers, parts)


def _copied(base: BaseModel, *, shared: bool) -> list[WrappedLayer]:
    """Return copies of all layers, frozen: with the base model's very weights, or their own."""
    layers: nn.ModuleList = base.model.get_decoder().layers  # type: ignore[no-untyped-call]
    layers.requires_grad_(False)
    kept = [base.model.config, *(layers.parameters() if shared else ())]
    return list(copy.deepcopy(layers, {id(each): each for each in kept}))  # type: ignore[arg-type]
