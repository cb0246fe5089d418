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

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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
    for layer in model.get_decoder().layers:  # type: ignore[no-untyped-call]
        for module in list(layer.modules()):
            for names in SAME_INPUT:
                parts = [getattr(module, name, None) for name in names]
                if all(type(part) is nn.Linear for part in parts):
                    _merge(module, names, [p for p in parts if isinstance(p, nn.Linear)])
                    merged += 1
    return merged


@torch.no_grad()
def _merge(module: nn.Module, names: Sequence[str], parts: Sequence[nn.Linear]) -> None:
    weight = torch.cat([part.weight.data for part in parts])
    biases = [part.bias.data for part in parts if part.bias is not None]
    bias = torch.cat(biases) if len(biases) == len(parts) else None
    assert bias is not None or not biases, "some of the projections have a bias and some have none"
    start = 0
    for name, part in zip(names, parts, strict=True):
        end = start + part.out_features
        setattr(module, name, MergedProjection(weight, bias, start, end))
        start = end
