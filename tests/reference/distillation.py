"""Gradients of distillation, by the definitions, on plain transformers in float64.

Every model is a copy of its own, all logits are there at once, and autograd does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.reference.divergence import substituted


def kl_gradients(
    model: PreTrainedModel,
    maps: Mapping[int, tuple[Tensor, Tensor]],
    tokens: Tensor,
    weights: Tensor,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the gradients of the weighted sum of KL(full || pruned) by each weight and bias.

    Args:
        model: unwrapped.
        maps: of each dropped layer, weight [width, width] and bias [width].
        tokens: [samples, length].
        weights: [samples, length - 1]: of each predicted token.
    """
    model = model.double()
    leaves = {
        layer: (weight.double().requires_grad_(), bias.double().requires_grad_())
        for layer, (weight, bias) in maps.items()
    }
    with torch.no_grad():
        p = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    pruned = substituted(model, leaves)
    q = pruned(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    loss = ((p.exp() * (p - q)).sum(-1) * weights).sum()
    flat = [part for pair in leaves.values() for part in pair]
    found = iter(torch.autograd.grad(loss, flat))
    return {layer: (next(found), next(found)) for layer in leaves}
