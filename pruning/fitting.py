"""Closed-form substitutes for a given set of layers, in one sweep from the first to the last.

Each map is fitted with everything before it dropped and substituted already: it sees what it will
be given. So the residual stream of all tokens is held once, where the sweep stands, and not for
every layer. (greedy selection fits in the order of its ranking instead, since its set grows.)

Knows the order and the memory; the map itself is solved in substitutes.py. The same sweep measures
the inputs of substitutes that are there already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pruning.attention import CausalAttention
from pruning.calibration import Progress, silent
from pruning.coordinates import InputStatistics
from pruning.corpus import Rows
from pruning.loading import BaseModel
from pruning.substitutes import LinearSubstitute, Moments, SubstituteKind, fit_linear
from pruning.twin import Twin

_BATCH = 8
"""Sequences computed together."""


@torch.no_grad()
def fit_in_order(
    base: BaseModel,
    rows: Sequence[Rows],
    layers: Collection[int],
    kind: SubstituteKind,
    progress: Progress = silent,
) -> dict[int, LinearSubstitute]:
    """Return the float32 substitutes of all these layers when all of them are dropped.

    Memory: tokens x width numbers in the model's dtype, once.

    Raises:
        SubstituteError: what the layers compute is not finite.
    """
    sweep = _Sweep(base, rows, layers, progress)
    found: dict[int, LinearSubstitute] = {}
    for done, layer in enumerate(sorted(layers), start=1):
        sweep.advance(layer, found)
        found[layer] = fit_linear(sweep.pairs(layer), kind, torch.float32)
        progress("fitting substitutes", done, len(layers))
    return found


@torch.no_grad()
def input_statistics(
    base: BaseModel,
    rows: Sequence[Rows],
    substitutes: Mapping[int, LinearSubstitute],
    progress: Progress = silent,
) -> dict[int, InputStatistics]:
    """Return what the normed inputs of all these layers are like when they are all dropped and
    substituted."""
    sweep = _Sweep(base, rows, substitutes, progress)
    found = {}
    for layer in sorted(substitutes):
        sweep.advance(layer, substitutes)
        moments = Moments(sweep.width, base.device)
        for normed, output in sweep.pairs(layer):
            moments.add(normed, output)
        covariance, _ = moments.covariances()
        found[layer] = InputStatistics(moments.sums[0] / moments.count, covariance)
    return found


class _Sweep:
    """All sequences' residual streams before one layer."""

    def __init__(
        self,
        base: BaseModel,
        rows: Sequence[Rows],
        layers: Collection[int],
        progress: Progress,
    ) -> None:
        self._base = base
        self._twin = Twin(base, layers)
        self._at = self._twin.first
        self._batches = [batch for part in rows for batch in part.split(_BATCH)]
        self._entering: list[Tensor] = []
        self._embeddings: Sequence[tuple[Tensor, Tensor]] = ()
        for done, batch in enumerate(self._batches, start=1):
            found = self._twin.full(batch.token_ids.to(base.device))
            self._entering.append(found.entering)
            self._embeddings = found.embeddings  # those of one sequence, the same for all
            progress("running the full model", done, len(self._batches))

    @property
    def width(self) -> int:
        return self._entering[0].shape[-1]

    def advance(self, layer: int, substitutes: Mapping[int, LinearSubstitute]) -> None:
        """Go on until before `layer`."""
        device, dtype = self._base.device, self._base.model.dtype
        ready = {index: each.copied(device, dtype) for index, each in substitutes.items()}
        for index in range(self._at, layer):
            for place, hidden in enumerate(self._entering):
                self._entering[place] = self._twin.leaving(
                    index, hidden, self._embeddings[index], ready
                )
        self._at = layer

    def pairs(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the sublayer's normed input and its output, both [tokens, width]."""
        sublayer = self._base.sublayers[layer]
        embeddings = self._embeddings[layer]
        for hidden, batch in zip(self._entering, self._batches, strict=True):
            normed = sublayer.norm(hidden)
            output = sublayer.attended(normed, embeddings, CausalAttention(), layer)
            where = batch.real.to(normed.device)
            yield normed.flatten(0, 1)[where], output.flatten(0, 1)[where]
