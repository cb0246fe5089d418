"""Plain transformers with dropped sublayers, for any family, by an argument too simple to be wrong.

An attention sublayer adds `attention(norm(h))` to `h`. If its output projection is zero, it adds
exactly zero (a norm of zero is zero, a multiple of zero is zero), which is what dropping it means.
An MLP adds zero likewise if its last projection is zero.
Nothing of the project is used: the model's own code runs, unwrapped, with its own masks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel


def silenced(
    model: PreTrainedModel, dropped: Iterable[int], mlps: Iterable[int] = ()
) -> PreTrainedModel:
    """Return a copy of an unwrapped model in which these layers' attention adds zero, and so do
    these layers' MLPs."""
    model = copy.deepcopy(model)
    layers = model.get_decoder().layers
    with torch.no_grad():
        for projection in (
            *(layers[layer].self_attn.o_proj for layer in dropped),
            *(layers[layer].mlp.down_proj for layer in mlps),
        ):
            projection.weight.zero_()
            if projection.bias is not None:
                projection.bias.zero_()
    return model


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """Return `count` greedy tokens after a prompt, recomputing everything for each of them."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
