"""Residuals: the residual stream entering every layer, kept over fixed tokens while layers drop.

Dropping one more sublayer changes nothing before it, so only the layers after it are computed
again; so it is when sublayers change places, from the first one that changes on::

    entering   [ 0 | 1 | 2 | 3 | 4 | end ]      2 dropped already
    drop 3       kept . . .  | 4 | end          computed again
    1 for 3      kept  | 2 | 3 | 4 | end        computed again

What is held: `layers + 1` tensors [samples, length, width] in the model's dtype. For the embedded
model and 24 x 128 tokens in float32 that is 220 MB. This file knows how a wrapped model's layers
are called; it knows nothing of distributions, rankings or plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruning.attention import CausalAttention
from pruning.calibration import Progress, silent
from pruning.loading import BaseModel
from pruning.sublayers import Substitute, WrappedLayer, watching_layers

_BATCH = 8
"""Samples computed together, so that temporaries stay small."""


class Residuals:
    """A base model over fixed sequences, with a set of dropped sublayers that changes."""

    def __init__(
        self,
        base: BaseModel,
        token_ids: Tensor,
        progress: Progress = silent,
        *,
        predicted_from: int = 1,
    ) -> None:
        """Run the full model once.

        Args:
            token_ids: [samples, length].
            predicted_from: the first position whose token is predicted, 1 or more.

        Substitutes that stand in the base model's sublayers are not used here: each drop names
        its own.
        """
        decoder = base.model.get_decoder()  # type: ignore[no-untyped-call]
        self._layers: Sequence[WrappedLayer] = decoder.layers
        self._norm: nn.Module = decoder.norm
        self._sublayers = base.sublayers
        self._embeddings: list[Any] = [None] * base.layers
        self._entering: list[list[Tensor]] = []
        self._dropped: dict[int, Substitute | None] = {}
        self._mlps: frozenset[int] = frozenset()
        self._predicted_from = predicted_from
        self._start(base, token_ids, progress)

    def last(self) -> Tensor:
        """Return what the head sees where the next token is known and predicted:
        [samples * (length - predicted_from), width]."""
        return torch.cat([self._headed(part) for part in self._entering[-1]])

    def last_without(self, layer: int, substitute: Substitute | None = None) -> Tensor:
        """Return what `last` would be if `layer` were dropped too; nothing is kept."""
        return self.last_of({**self._dropped, layer: substitute})

    @torch.inference_mode()
    def last_of(self, dropped: Mapping[int, Substitute | None]) -> Tensor:
        """Return what `last` would be if exactly these layers' attention were dropped, beside the
        MLPs that are; nothing is kept."""
        first = self._first_changed(dropped, self._mlps)
        found = []
        for hidden in self._entering[first]:
            for index in range(first, len(self._layers)):
                hidden = self._leaving(index, hidden, dropped, self._mlps)
            found.append(self._headed(hidden))
        return torch.cat(found)

    def drop(
        self, layers: Mapping[int, Substitute | None], mlps: frozenset[int] = frozenset()
    ) -> None:
        """Drop more layers' attention, or put their substitutes in their places, and more layers'
        MLPs, and keep what follows."""
        assert layers.keys().isdisjoint(self._dropped), "a layer is dropped already"
        self.become({**self._dropped, **layers}, self._mlps | mlps)

    @torch.inference_mode()
    def become(
        self, dropped: Mapping[int, Substitute | None], mlps: frozenset[int] = frozenset()
    ) -> None:
        """Drop exactly these layers' attention and these MLPs; others come back."""
        first = self._first_changed(dropped, mlps)
        self._dropped, self._mlps = dict(dropped), mlps
        for index in range(first, len(self._layers)):
            for part, hidden in enumerate(self._entering[index]):
                self._entering[index + 1][part] = self._leaving(index, hidden, self._dropped, mlps)

    def _first_changed(self, dropped: Mapping[int, Substitute | None], mlps: frozenset[int]) -> int:
        """Return the first layer that does not do what it does now; the number of layers if all
        do."""
        return next(
            (
                index
                for index in range(len(self._layers))
                if (index in dropped) != (index in self._dropped)
                or dropped.get(index) is not self._dropped.get(index)
                or (index in mlps) != (index in self._mlps)
            ),
            len(self._layers),
        )

    @torch.inference_mode()
    def sublayer_pairs(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the normed input and the output of an attention sublayer, both [rows, width], a few
        samples at a time, given what is dropped already: what a substitute has to map."""
        sublayer = self._sublayers[layer]
        for hidden in self._entering[layer]:
            normed = sublayer.norm(hidden)
            embeddings = self._embeddings[layer]
            output = sublayer.attended(normed, embeddings, CausalAttention(), layer)
            yield normed.flatten(0, 1), output.flatten(0, 1)

    def _start(self, base: BaseModel, token_ids: Tensor, progress: Progress) -> None:
        """Keep what enters each layer of the full model, as the family's own loop calls it."""
        self._entering = [[] for _ in range(base.layers + 1)]

        def enter(index: int, hidden: Tensor, embeddings: tuple[Tensor, Tensor]) -> None:
            self._embeddings[index] = embeddings
            self._entering[index].append(hidden)

        end = self._norm.register_forward_pre_hook(
            lambda _, args: self._entering[-1].append(args[0])
        )
        try:
            with watching_layers(base.model, enter):
                for first in range(0, len(token_ids), _BATCH):
                    batch = token_ids[first : first + _BATCH].to(base.device)
                    with torch.inference_mode():
                        base.model(batch, logits_to_keep=1)
                    progress("running the full model", first + len(batch), len(token_ids))
        finally:
            end.remove()

    def _leaving(
        self,
        index: int,
        hidden: Tensor,
        dropped: Mapping[int, Substitute | None],
        mlps: frozenset[int],
    ) -> Tensor:
        """Return what leaves a layer, [samples, length, width]."""
        layer = self._layers[index]
        if index in mlps and index in dropped:
            return layer.attention.replaced(hidden, dropped[index])
        if index in mlps:
            return layer.without_mlp(hidden, self._embeddings[index])
        if index in dropped:
            return layer.without_attention(hidden, dropped[index])
        return layer(hidden, position_embeddings=self._embeddings[index])  # type: ignore[no-any-return]

    def _headed(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden[:, self._predicted_from - 1 : -1]).flatten(0, 1)  # type: ignore[no-any-return]
