"""Trial: the full model and a pruned one side by side on fixed tokens, as layers drop.

Knows residual streams and divergences; knows nothing of how layers are chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from pruning.divergence import Divergence, FullDistribution, Quality
from pruning.loading import BaseModel
from pruning.residuals import Residuals
from pruning.sublayers import Substitute

Replaced = Mapping[int, Substitute | None]
"""Dropped layers, each with what stands in its place."""


class Trial:
    """What dropping costs on one set of tokens."""

    def __init__(self, base: BaseModel, token_ids: Tensor, *, predicted_from: int = 1) -> None:
        """Run the full model once.

        Args:
            token_ids: [samples, length].
            predicted_from: the first position whose token is predicted, 1 or more.

        Raises:
            DivergenceError: its logits are not finite.
        """
        self._residuals = Residuals(base, token_ids, predicted_from=predicted_from)
        targets = token_ids[:, predicted_from:].flatten()
        self._full = FullDistribution(base, self._residuals.last(), targets)
        self.baseline = self._full.baseline()

    def without_each(self, layers: Replaced) -> dict[int, Quality]:
        """Return the quality if one more layer were dropped, for each of these."""
        lasts = [self._residuals.last_without(layer, layers[layer]) for layer in layers]
        return {
            layer: divergence.quality
            for layer, divergence in zip(layers, self._full.compare(lasts), strict=True)
        }

    def drop(self, layers: Replaced, mlps: frozenset[int] = frozenset()) -> None:
        """Drop more layers' attention and more layers' MLPs for good."""
        self._residuals.drop(layers, mlps)

    def of_each(self, sets: Sequence[Collection[int]]) -> list[Quality]:
        """Return the quality if exactly these layers were dropped, for each set; nothing stands in
        their places."""
        lasts = [self._residuals.last_of(dict.fromkeys(dropped)) for dropped in sets]
        return [divergence.quality for divergence in self._full.compare(lasts)]

    def become(self, dropped: Collection[int]) -> None:
        """Drop exactly these layers, with nothing in their places; what is near is cheapest."""
        self._residuals.become(dict.fromkeys(dropped))

    def snapshot(self) -> Tensor:
        """Return what the pruned model's head sees now, [tokens, width], to be compared later."""
        return self._residuals.last()

    def divergences(self, snapshots: Sequence[Tensor]) -> list[Divergence]:
        """Return how far the pruned model was from the full one at each of these moments; together
        they cost less than one by one."""
        return self._full.compare(snapshots)

    def quality(self) -> Quality:
        """Return what the pruned model is worth now."""
        return self.divergences([self.snapshot()])[0].quality
