"""Batches: which rows a training step sees, by the number of the step alone.

Every source has the same share of a batch, and its rows come in an order that is shuffled anew each
time round. A step's rows depend on the seed and the step, so training that was broken off goes on
with what it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.corpus import Rows


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step is trained on."""

    token_ids: Tensor
    """[rows, length], int64."""
    where: Tensor
    """[tokens]: places in the flat [rows * length] whose next token is predicted."""
    weights: Tensor
    """[tokens], float32: they sum to 1, and so that each source present weighs the same."""

    def on(self, device: torch.device) -> Batch:
        """Return it on a device; a GPU is not waited for."""
        return Batch(
            _moved(self.token_ids, device), _moved(self.where, device), _moved(self.weights, device)
        )


class Batches:
    """An endless sequence of batches over the training rows of several sources."""

    def __init__(self, sources: Sequence[Rows], size: int, seed: int) -> None:
        self._sources = sources
        self._size = size
        self._seed = seed
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def at(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        chosen: dict[int, list[int]] = {}
        for place in range(step * self._size, (step + 1) * self._size):
            draw, source = divmod(place, len(self._sources))
            chosen.setdefault(source, []).append(self._row(source, draw))
        parts = [self._sources[source][torch.tensor(rows)] for source, rows in chosen.items()]
        batch = Rows(
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.starts for part in parts]),
            torch.cat([part.ends for part in parts]),
        )
        weights = [
            torch.full((part.predicted,), 1 / (len(parts) * max(1, part.predicted)))
            for part in parts
        ]
        return Batch(batch.token_ids, batch.predicting, torch.cat(weights))

    def _row(self, source: int, draw: int) -> int:
        """Return which row of a source is drawn, counted over all draws from it."""
        epoch, place = divmod(draw, len(self._sources[source]))
        if self._orders.get(source, (-1, []))[0] != epoch:
            mixed = hashlib.sha256(f"{self._seed} {source} {epoch}".encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(mixed))
            order = torch.randperm(len(self._sources[source]), generator=generator)
            self._orders[source] = (epoch, order.tolist())
        return self._orders[source][1][place]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
