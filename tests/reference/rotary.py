"""Rotary embeddings (Su et al., arXiv 2104.09864), number by number: slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [..., rows, dim] with the pair (i, i + dim / 2) of each row turned by its angle,
    whose cosine and sine are at [row, i] of cos and sin [rows, dim]."""
    half = x.shape[-1] // 2
    turned = torch.empty_like(x)
    for i in range(half):
        first, second = x[..., i], x[..., i + half]
        turned[..., i] = first * cos[:, i] - second * sin[:, i]
        turned[..., i + half] = second * cos[:, i] + first * sin[:, i]
    return turned
