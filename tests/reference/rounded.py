"""Plain transformers whose attention sees keys and values rounded to E4M3, all of them, always.

The model's own attention runs, with its own masks; nothing is kept between two passes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

_LARGEST = 448.0


def rounded(values: Tensor) -> Tensor:
    """Return the nearest values that E4M3 holds, in the same dtype."""
    return values.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).to(values.dtype)


def with_rounded_keys(model: PreTrainedModel) -> PreTrainedModel:
    """Make an unwrapped model attend to rounded keys and values, and return it."""
    AttentionInterface.register("rounded", _rounded_attention)
    AttentionMaskInterface.register("rounded", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation("rounded")
    return model


def _rounded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any
) -> Any:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, rounded(key), rounded(value), *others, **named)
