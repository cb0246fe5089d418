"""Scores -> ranking: the order in which layers would be dropped. One function per strategy.

A strategy sees the base model and the calibration set, so that one which measures again after
every drop fits in beside the paper's one-shot rule. Knows nothing of plans or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pruning.calibration import CalibrationSet, Progress
from pruning.importance import measure_importance
from pruning.loading import BaseModel

ALWAYS_KEPT = 0
"""Layer 0 keeps its attention in every variant."""


@dataclass(frozen=True, slots=True)
class DropStep:
    """One step of a ranking: the layer dropped next, and what that was measured to cost."""

    layer: int
    cost: float | None
    """The strategy's own measure, lower is better; None where nothing was measured."""


Ranking = tuple[DropStep, ...]
"""The layers in the order in which they would be dropped."""


class Strategy(Protocol):
    """Ranks all layers but the protected ones and layer 0."""

    def __call__(
        self,
        base: BaseModel,
        calibration: CalibrationSet,
        protected: frozenset[int],
        progress: Progress,
    ) -> Ranking: ...


def rank_by_importance(importance: Sequence[float], protected: frozenset[int]) -> Ranking:
    """Return the layers by rising importance, which is their cost; ties by lower layer index."""
    droppable = set(range(len(importance))) - protected - {ALWAYS_KEPT}
    order = sorted(droppable, key=lambda layer: (importance[layer], layer))
    return tuple(DropStep(layer, importance[layer]) for layer in order)


def cosine(
    base: BaseModel, calibration: CalibrationSet, protected: frozenset[int], progress: Progress
) -> Ranking:
    """The paper's one-shot rule: measure every layer once, drop the least important first."""
    return rank_by_importance(measure_importance(base, calibration, progress=progress), protected)


DEFAULT_STRATEGY = "cosine"

STRATEGIES: Mapping[str, Strategy] = {"cosine": cosine}
