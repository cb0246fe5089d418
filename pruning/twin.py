"""Twin: the full model and a pruned one over the same sequences; gradients reach substitutes.

What lies before the first dropped layer is the same in both, and is computed once::

    full     [ 0 | 1 | 2 | 3 | 4 ]  no gradients
                   `entering`
    pruned           [ 2'| 3 | 4']  gradients of the substitutes, which are given by the caller

A pruned model may have layers of its own, in which more than the substitutes is trained. Then
nothing of the full model's is used again, and all of them are computed.

Knows how a wrapped model's layers are called; knows nothing of losses, plans or where substitutes
come from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.loading import BaseModel
from pruning.sublayers import Substitute, WrappedLayer, computing_layers, watching_layers

Replacements = Mapping[int, Substitute | None]
"""All dropped layers, each with what stands in its place."""


@dataclass(frozen=True, slots=True, eq=False)
class FullPass:
    """What a pass of the full model leaves for one of the pruned model."""

    entering: Tensor
    """[samples, length, width]: the residual stream before the pruned model's first layer that is
    not the full model's."""
    embeddings: Sequence[tuple[Tensor, Tensor]]
    """Of each layer: cosines and sines of every position."""
    last: Tensor
    """[samples, length, width]: what the full model's head sees."""


class Twin:
    """A base model that runs in full, and from the first dropped layer on with substitutes."""

    def __init__(
        self,
        base: BaseModel,
        dropped: Collection[int],
        *,
        compiled: bool = False,
        layers: Sequence[WrappedLayer] | None = None,
    ) -> None:
        """Make one.

        Args:
            dropped: at least one layer.
            compiled: compute layers by functions compiled for the shape of what they are given,
                which pays where that is always the same: in training on a GPU.
            layers: all those of the pruned model; None: they are the full model's.
        """
        self.dropped = tuple(sorted(dropped))
        self._compiled = compiled
        self._whole = WrappedLayer.causal
        self._without = WrappedLayer.without_attention
        if compiled:
            self._whole = torch.compile(self._whole, dynamic=False)
            self._without = torch.compile(self._without, dynamic=False)
        self._model = base.model
        self._decoder: Any = base.model.get_decoder()  # type: ignore[no-untyped-call]
        self._layers: Sequence[WrappedLayer] = self._decoder.layers if layers is None else layers
        self._norm: nn.Module = self._decoder.norm
        self.first = self.dropped[0] if layers is None else 0
        """The first layer of the pruned model that is not the full model's."""

    @torch.no_grad()
    def full(self, token_ids: Tensor) -> FullPass:
        """Run the full model on [samples, length] token ids on its device."""
        entering: list[Tensor] = []
        embeddings: list[tuple[Tensor, Tensor]] = []

        def note(index: int, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> None:
            embeddings.append(positions)
            if index == self.first:
                entering.append(hidden)

        with self._computing(), watching_layers(self._model, note):
            last = self._decoder(token_ids).last_hidden_state
        return FullPass(entering[0], embeddings, last)

    def pruned(self, full: FullPass, replacements: Replacements) -> Tensor:
        """Return what the pruned model's head sees, [samples, length, width]."""
        hidden = full.entering
        for index in range(self.first, len(self._layers)):
            hidden = self.leaving(index, hidden, full.embeddings[index], replacements)
        return self._norm(hidden)  # type: ignore[no-any-return]

    def leaving(
        self,
        index: int,
        hidden: Tensor,
        embeddings: tuple[Tensor, Tensor],
        replacements: Replacements,
    ) -> Tensor:
        """Return what leaves a layer, given what enters it, [samples, length, width]."""
        layer = self._layers[index]
        if index not in replacements:
            return self._whole(layer, hidden, embeddings)
        return self._without(layer, hidden, replacements[index])

    def _computing(self) -> AbstractContextManager[None]:
        """Let the full model's layers compute by the compiled function, if there is one."""
        return computing_layers(self._model, self._whole) if self._compiled else nullcontext()
