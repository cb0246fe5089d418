"""What weights in eight bits stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine import many_rows
from server.engine.eight_bits import EightBits, Kind, eight_bits


def write_out_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch write out weights for products where Triton's kernel would be interpreted, which
    takes two seconds a pass of a tiny model; tests/engine/test_linear.py holds it equal to this."""

    def expanded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return EightBits(weight, scale).expanded().to(dtype)

    if not torch.cuda.is_available():
        monkeypatch.setattr(many_rows, "expanded", expanded)


def round_weights(model: PreTrainedModel, kind: Kind) -> PreTrainedModel:
    """Replace, one by one, the weights that are put into eight bits by what the bytes stand for.

    In float32 and above they are so exactly; in fewer bits they are rounded again.
    """
    parts = [p for p in model.get_decoder().layers.modules() if type(p) is nn.Linear]
    for part in [*parts, model.get_output_embeddings()]:
        weight = eight_bits(part.weight, kind).expanded().to(part.weight.dtype)
        part.weight = nn.Parameter(weight, requires_grad=False)
    return model
