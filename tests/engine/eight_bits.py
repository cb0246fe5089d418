"""What weights in eight bits stand for."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from server.engine.eight_bits import Kind, eight_bits


def round_weights(model: PreTrainedModel, kind: Kind) -> PreTrainedModel:
    """Replace, one by one, the weights that are put into eight bits by what the bytes stand for.

    In float32 and above they are so exactly; in fewer bits they are rounded again.
    """
    parts = [p for p in model.get_decoder().layers.modules() if type(p) is nn.Linear]
    for part in [*parts, model.get_output_embeddings()]:
        weight = eight_bits(part.weight, kind).expanded().to(part.weight.dtype)
        part.weight = nn.Parameter(weight, requires_grad=False)
    return model
