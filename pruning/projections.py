"""Projections of the same input, merged: queries, keys and values; the MLP's gate and up.

A narrow matrix product does not fill a GPU's memory bus; one over the merged weight does. Each
projection stays a module of its own, so a family's code is unchanged: its weight becomes a view of
the merged one (no second copy), and under a compiler each of them is a slice of the same product,
which the compiler computes once::

    merged weight   [ q . . . . . . . | k . | v . ]
    q_proj(x)       (x @ merged)[:q]       k_proj(x)   (x @ merged)[q:k]       one product

Run without a compiler, each projection multiplies by its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class MergedProjection(nn.Module):
    """One projection, rows `start` to `end` of a merged one."""

    merged_weight: Tensor
    merged_bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, start: int, end: int) -> None:
        """weight is the merged one, [all outputs, inputs]; bias [all outputs] or None."""
        super().__init__()
        self.register_buffer("merged_weight", weight, persistent=False)
        self.register_buffer("merged_bias", bias, persistent=False)
        self.weight = nn.Parameter(weight[start:end], requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias[start:end], requires_grad=False)
        self._start, self._end = start, end

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            merged = functional.linear(inputs, self.merged_weight, self.merged_bias)
            return merged[..., self._start : self._end]
        return functional.linear(inputs, self.weight, self.bias)


def merge_projections(model: PreTrainedModel) -> int:
    """Merge the projections of every layer in place; return how many merged weights there are now.

    At most one merged weight exists twice at any time. Layers that keep such projections merged
    already (Phi-3) stay as they are, and so do quantised ones.
    """
    merged = 0
    for parent, parts in same_input_projections(model):
        weight, bias = concatenated(list(parts.values()))
        start = 0
        for name, part in parts.items():
            end = start + part.out_features
            setattr(parent, name, MergedProjection(weight, bias, start, end))
            start = end
        merged += 1
    return merged


def same_input_projections(
    model: PreTrainedModel,
) -> Iterator[tuple[nn.Module, dict[str, nn.Linear]]]:
    """Yield the plain linear layers of each module that have the same input, by their names there.

    They may be replaced while this goes on.
    """
    for layer in model.get_decoder().layers:  # type: ignore[no-untyped-call]
        for parent in list(layer.modules()):
            for names in _SAME_INPUT:
                parts = {name: getattr(parent, name, None) for name in names}
                linears = {n: part for n, part in parts.items() if type(part) is nn.Linear}
                if len(linears) == len(names):
                    yield parent, linears


def concatenated(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Return the weight [all outputs, inputs] and bias of one layer with the outputs of all."""
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears)), "some projections have a bias and some have none"
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return weight, torch.cat(biases) if biases else None
