"""The paper's score: how much a sublayer turns the residual stream.

importance = 1 - cos(X, Y), mean over tokens, with X the residual stream before the sublayer's norm
and Y = X + Attn(norm(X)) (He et al., arXiv 2406.15786, section 3). In families with a norm after
attention or a residual multiplier, Y is the sublayer's full output all the same. For an MLP, X is
what enters its norm and Y = X + MLP(norm(X)); for a block, X enters the layer and Y leaves it. This
file watches a running model; it knows nothing of rankings or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.calibration import Progress, silent
from pruning.loading import BaseModel
from pruning.sublayers import WrappedLayer
from pruning.targets import ATTENTION, BLOCK, MLP

DEFAULT_BATCH_SIZE = 8


class ImportanceError(ValueError):
    """The scores cannot be computed."""


class _CosineSum:
    """A running sum of one sublayer's cosines, kept in float64 on the model's device."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(
        self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        entering = inputs[0] if inputs else named["hidden_states"]
        cosines = functional.cosine_similarity(entering.float(), output.float(), dim=-1)
        self.total += cosines.sum(dtype=torch.float64)


@torch.inference_mode()
def measure_importance(
    base: BaseModel,
    token_ids: Tensor,
    target: str = ATTENTION,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress = silent,
) -> tuple[float, ...]:
    """Return each layer's importance, from one pass over calibration tokens [samples, length]:
    that of its attention, its MLP (`mlp`) or the whole layer (`block`).

    Nothing but a sum per layer is kept. The base model must drop nothing while this runs.

    Raises:
        ImportanceError: a score is not finite.
    """
    with _watched(base, target) as sums:
        for start in range(0, len(token_ids), batch_size):
            batch = token_ids[start : start + batch_size]
            base.model(batch.to(base.device), logits_to_keep=1)
            progress("measuring importance", start + len(batch), len(token_ids))
    return _finite(base, tuple(1.0 - (each.total / token_ids.numel()).item() for each in sums))


@contextmanager
def _watched(base: BaseModel, target: str) -> Iterator[list[_CosineSum]]:
    """Collect the cosines of every layer's target for as long as the context lasts."""
    modules = _modules(base, target)
    sums = [_CosineSum(base.device) for _ in modules]
    handles = [
        module.register_forward_hook(each, with_kwargs=True)
        for module, each in zip(modules, sums, strict=True)
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _modules(base: BaseModel, target: str) -> Sequence[nn.Module]:
    """Return what turns the residual stream, one module a layer."""
    layers: Sequence[WrappedLayer] = base.model.get_decoder().layers  # type: ignore[no-untyped-call]
    if target == BLOCK:
        return layers
    return [layer.mlp if target == MLP else layer.attention for layer in layers]


def _finite(base: BaseModel, scores: tuple[float, ...]) -> tuple[float, ...]:
    broken = [layer for layer, score in enumerate(scores) if not math.isfinite(score)]
    if broken:
        dtype = str(base.model.dtype).removeprefix("torch.")
        raise ImportanceError(
            f"the importance of layers {broken} is not finite in {dtype}; load the model with "
            "--dtype bfloat16 or float32"
        )
    return scores
