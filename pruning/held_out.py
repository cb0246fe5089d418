"""HeldOut: what a pruned model is worth on the rows of a corpus that are not trained on.

The full model runs once; of each row, the residual stream before the first dropped layer and what
the head sees are kept. Computed in the model's own dtype, as it will be served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pruning.corpus import Rows, Source
from pruning.divergence import Baseline, FullDistribution, Quality, joined
from pruning.loading import BaseModel
from pruning.twin import FullPass, Replacements, Twin

_BATCH = 8
"""Rows computed together."""


class HeldOut:
    """The held-out rows of all sources."""

    def __init__(self, base: BaseModel, twin: Twin, sources: Sequence[Source]) -> None:
        """Run the full model.

        Raises:
            DivergenceError: its logits are not finite.
        """
        self._parts = {each.name: _Part(base, twin, each.held_out) for each in sources}

    @property
    def baselines(self) -> Mapping[str, Baseline]:
        """The full model, by source."""
        return {name: part.baseline for name, part in self._parts.items()}

    def qualities(self, replacements: Replacements) -> Mapping[str, Quality]:
        """Return what a pruned model is worth, by source.

        Raises:
            DivergenceError: its logits are not finite.
        """
        return {name: part.quality(replacements) for name, part in self._parts.items()}


def mean_kl(qualities: Mapping[str, Quality]) -> float:
    """Return the mean over sources."""
    return sum(each.kl for each in qualities.values()) / len(qualities)


class _Part:
    """The held-out rows of one source."""

    def __init__(self, base: BaseModel, twin: Twin, rows: Rows) -> None:
        self._twin = twin
        self._passes: list[tuple[FullPass, torch.Tensor]] = []
        lasts, targets = [], []
        with torch.inference_mode():
            for batch in rows.split(_BATCH):
                token_ids = batch.token_ids.to(base.device)
                where = batch.predicting.to(base.device)
                found = twin.full(token_ids)
                self._passes.append((found, where))
                lasts.append(found.last.flatten(0, 1)[where])
                targets.append(token_ids.flatten()[where + 1])
        self._full = [
            FullDistribution(base, last, target)
            for last, target in zip(lasts, targets, strict=True)
        ]
        whole = FullDistribution(base, torch.cat(lasts), torch.cat(targets))
        self.baseline = whole.baseline()

    @torch.inference_mode()
    def quality(self, replacements: Replacements) -> Quality:
        found = []
        for (full, where), distribution in zip(self._passes, self._full, strict=True):
            last = self._twin.pruned(full, replacements).flatten(0, 1)[where]
            found += distribution.compare([last])
        return joined(found).quality
