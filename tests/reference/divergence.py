"""What dropping costs, by the definitions, on plain transformers: slow and without any sharing.

Every model is a copy of its own and runs from its first layer; all logits are there at once, in
float64.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.families import FAMILIES
from tests.reference.silenced import silenced


@dataclass(frozen=True)
class Cost:
    kl: float
    agreement: float
    perplexity: float


class Stand(nn.Module):
    """Stands in an attention module's place: the given map of the normed input."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return hidden_states @ self.weight.T + self.bias, None


def substituted(
    model: PreTrainedModel, maps: Mapping[int, tuple[Tensor, Tensor]]
) -> PreTrainedModel:
    """Return a copy of an unwrapped model in which a linear map, its weight [width, width] and bias
    [width], gives what these layers' attention (and the norm after it) gave."""
    model = silenced(model, ())
    post_norm = FAMILIES[model.config.model_type].attention_post_norm
    for layer, (weight, bias) in maps.items():
        parts = model.get_decoder().layers[layer]
        parts.self_attn = Stand(weight, bias)
        if post_norm is not None:
            setattr(parts, post_norm, nn.Identity())
    return model


@torch.no_grad()
def cost(full: PreTrainedModel, pruned: PreTrainedModel, tokens: Tensor) -> Cost:
    """Return what the pruned model costs on tokens [samples, length]."""
    p = full(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    q = pruned(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    loss = -q.gather(-1, tokens[:, 1:, None]).mean()
    return Cost(
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        agreement=(p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        perplexity=loss.exp().item(),
    )


def greedy_order(
    model: PreTrainedModel, tokens: Tensor, droppable: Collection[int]
) -> list[tuple[int, float]]:
    """Return the layers in greedy order, each with the KL once it is dropped; all are tried."""
    order: list[tuple[int, float]] = []
    while left := sorted(set(droppable) - {layer for layer, _ in order}):
        dropped = [layer for layer, _ in order]
        costs = [cost(model, silenced(model, [*dropped, layer]), tokens).kl for layer in left]
        best = min(range(len(left)), key=lambda index: costs[index])
        order.append((left[best], costs[best]))
    return order


def least_squares(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return weight [outputs, inputs] and bias of the map from x to y, both [rows, width], that
    minimises the squared error plus `ridge` times the mean input variance per row, as one stacked
    least-squares problem."""
    x, y = x.double(), y.double()
    centred, target = x - x.mean(0), y - y.mean(0)
    variance = centred.square().mean()
    penalty = (ridge * variance * len(x)).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    stacked = torch.cat([centred, penalty])
    solution = torch.linalg.lstsq(stacked, torch.cat([target, torch.zeros_like(penalty)])).solution
    return solution.T, y.mean(0) - x.mean(0) @ solution
