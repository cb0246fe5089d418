"""The paper's score: how much an attention sublayer turns the residual stream.

importance = 1 - cos(X, Y), mean over tokens, with X the residual stream before the sublayer's norm
and Y = X + Attn(norm(X)) (He et al., arXiv 2406.15786, section 3). In families with a norm after
attention or a residual multiplier, Y is the sublayer's full output all the same. This file
watches the sublayers of a running model; it knows nothing of rankings or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pruning.calibration import Progress, silent
from pruning.loading import BaseModel
from pruning.sublayers import AttentionSublayer

DEFAULT_BATCH_SIZE = 8


class ImportanceError(ValueError):
    """The scores cannot be computed."""


class _CosineSum:
    """A running sum of one sublayer's cosines, kept in float64 on the model's device."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(
        self, sublayer: AttentionSublayer, inputs: tuple[Any, ...], output: Tensor
    ) -> None:
        cosines = functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
        self.total += cosines.sum(dtype=torch.float64)


@torch.inference_mode()
def measure_importance(
    base: BaseModel,
    token_ids: Tensor,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress = silent,
) -> tuple[float, ...]:
    """Return each layer's importance, from one pass over calibration tokens [samples, length].

    Nothing but a sum per layer is kept. The base model must drop nothing while this runs.

    Raises:
        ImportanceError: a score is not finite.
    """
    with _watched(base) as sums:
        for start in range(0, len(token_ids), batch_size):
            batch = token_ids[start : start + batch_size]
            base.model(batch.to(base.device), logits_to_keep=1)
            progress("measuring importance", start + len(batch), len(token_ids))
    return _finite(base, tuple(1.0 - (each.total / token_ids.numel()).item() for each in sums))


@contextmanager
def _watched(base: BaseModel) -> Iterator[list[_CosineSum]]:
    """Collect the cosines of every attention sublayer for as long as the context lasts."""
    sums = [_CosineSum(base.device) for _ in base.sublayers]
    handles = [
        sublayer.register_forward_hook(each)
        for sublayer, each in zip(base.sublayers, sums, strict=True)
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _finite(base: BaseModel, scores: tuple[float, ...]) -> tuple[float, ...]:
    broken = [layer for layer, score in enumerate(scores) if not math.isfinite(score)]
    if broken:
        dtype = str(base.model.dtype).removeprefix("torch.")
        raise ImportanceError(
            f"the importance of layers {broken} is not finite in {dtype}; load the model with "
            "--dtype bfloat16 or float32"
        )
    return scores
