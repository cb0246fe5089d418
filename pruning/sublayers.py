"""AttentionSublayer: the one place where attention is skipped or replaced.

`wrap` rewires a loaded model once. Every decoder layer becomes an attention sublayer followed by
an MLP sublayer, made of the family's own modules, so the weights stay where they are and are
shared by all variants. What attends is then said per forward call, as data::

    model(input_ids, position_ids=..., attend=..., attending_rows=[rows, rows, 3, 0, ...])

    layer 0   rows  [ full full full | pruned pruned ]   all attend
    layer 2   rows  [ full full full ]                   the first 3 attend, the rest pass through
    layer 3                                              nobody attends: no kernel is launched

MLPs are dropped in the same way, where some variant drops any, by `mlp_rows`.

Attention is all that rows ask of each other. So after the last layer in which any row attends, rows
without logits are of no more use, and `last` lets them go: of a prompt one row goes on::

    layer 0   rows  [ p p p p p p p q q q q ]    a chunk of prompt p, and q to its end
    layer 1   attention of all of them, the last that is kept; then the MLP of  [ q ]
    layer 2                                                                     [ q ]

This file and projections.py are the only ones that replace parts of a transformers model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.attention import Attend, CausalAttention, use_attend
from pruning.families import Family, family_of
from pruning.targets import Sublayers


class Substitute(Protocol):
    """Stands in a dropped sublayer's place: normed input [batch, rows, width] to its output."""

    def __call__(self, normed: Tensor) -> Tensor: ...


AttentionFunction = Callable[[Tensor, tuple[Tensor, Tensor], Attend, int], Tensor]
"""Hidden states, position embeddings, what attends and the layer's index, to hidden states."""


class Last(NamedTuple):
    """Where rows without logits end."""

    layer: int
    """The last one in which any row attends."""
    rows: Tensor
    """Those that go on from its attention, int64."""


LayerNote = Callable[[int, Tensor, tuple[Tensor, Tensor]], None]
"""Takes a layer's index, and the hidden states and position embeddings that enter it."""


class AttentionSublayer(nn.Module):
    """`h + multiplier * post_norm(attention(norm(h)))` for a prefix of the rows.

    The rows beyond the prefix are dropped rows: they pass through unchanged, or gain the
    substitute's output where one is set.
    """

    def __init__(self, layer: nn.Module, family: Family, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm = _part(layer, family.attention_norm)
        self.attention = _part(layer, family.attention)
        self.post_norm = _part(layer, family.attention_post_norm)
        self.multiplier = _multiplier(layer, family)
        self.substitute: Substitute | None = None

    def forward(
        self,
        hidden: Tensor,
        attending: int,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attend: Attend,
        layer: int,
    ) -> Tensor:
        """Apply the sublayer.

        Args:
            hidden: the residual stream, [batch, rows, width].
            attending: how many leading rows attend, 0 to rows.
            position_embeddings: cosines and sines of every row, as the family's model makes them.
            attend: computes the attention.
            layer: what `attend` is told; an argument, so that one compiled function serves all
                layers.
        """
        if attending == 0:
            return self._replace(hidden)
        if attending == hidden.shape[1]:
            return self._attend(hidden, position_embeddings, attend, layer)
        cos, sin = position_embeddings
        embeddings = (cos[:, :attending], sin[:, :attending])
        prefix = self._attend(hidden[:, :attending], embeddings, attend, layer)
        return torch.cat([prefix, self._replace(hidden[:, attending:])], dim=1)

    def _attend(
        self, hidden: Tensor, embeddings: tuple[Tensor, Tensor], attend: Attend, layer: int
    ) -> Tensor:
        output = self.attended(self.norm(hidden), embeddings, attend, layer)
        return _add(hidden, output, self.multiplier)

    def attended(
        self, normed: Tensor, embeddings: tuple[Tensor, Tensor], attend: Attend, layer: int
    ) -> Tensor:
        """Return what attention adds to the residual stream before the multiplier, for its normed
        input: what a substitute has to come close to. Both are [batch, rows, width]."""
        output, _ = self.attention(
            hidden_states=normed,
            position_embeddings=embeddings,
            attention_mask=None,
            attend=attend,
            layer=layer,
        )
        return self.post_norm(output)  # type: ignore[no-any-return]

    def replaced(self, hidden: Tensor, substitute: Substitute | None) -> Tensor:
        """Return the residual stream [batch, rows, width] of rows that do not attend."""
        if substitute is None:
            return hidden
        return _add(hidden, substitute(self.norm(hidden)), self.multiplier)

    def replace_by(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Let another function compute `replaced` of the substitute that stands here now, in
        forward passes; return the one that did so far."""
        before = self._replace
        self._replace = function  # type: ignore[assignment,method-assign]
        return before

    def _replace(self, hidden: Tensor) -> Tensor:
        return self.replaced(hidden, self.substitute)


class MlpSublayer(nn.Module):
    """`h + multiplier * post_norm(mlp(norm(h)))` for every row, or for a prefix of the rows."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__()
        self.norm = _part(layer, family.mlp_norm)
        self.mlp = _part(layer, family.mlp)
        self.post_norm = _part(layer, family.mlp_post_norm)
        self.multiplier = _multiplier(layer, family)

    def forward(self, hidden: Tensor) -> Tensor:
        return _add(hidden, self.post_norm(self.mlp(self.norm(hidden))), self.multiplier)

    def of_prefix(self, hidden: Tensor, rows: int) -> Tensor:
        """Apply the sublayer to the first `rows` rows of [batch, all rows, width]; the others pass
        through."""
        if rows == 0:
            return hidden
        return torch.cat([self(hidden[:, :rows]), hidden[:, rows:]], dim=1)


class WrappedLayer(nn.Module):
    """A decoder layer as its two sublayers, called by the family's own model loop."""

    def __init__(self, layer: nn.Module, family: Family, index: int) -> None:
        super().__init__()
        self.attention = AttentionSublayer(layer, family, index)
        self.mlp = MlpSublayer(layer, family)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attend: Attend | None = None,
        attending_rows: Sequence[int] | None = None,
        mlp_rows: Sequence[int] | None = None,
        last: Last | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("a wrapped model takes no attention_mask; pass `attend` instead")
        index, rows = self.attention.index, hidden_states.shape[1]
        attending = rows if attending_rows is None else attending_rows[index]
        attend = attend or CausalAttention()
        if last is not None and last.layer == index:
            return self._compute(
                hidden_states, attending, index, position_embeddings, attend, last.rows
            )
        if mlp_rows is None or mlp_rows[index] == rows:
            return self._compute(hidden_states, attending, index, position_embeddings, attend)
        hidden = self.attention(
            hidden_states,
            attending,
            position_embeddings=position_embeddings,
            attend=attend,
            layer=index,
        )
        return self.mlp.of_prefix(hidden, mlp_rows[index])

    def causal(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Return what leaves the layer when all rows attend, causally."""
        return self.mlp(self.without_mlp(hidden, position_embeddings))  # type: ignore[no-any-return]

    def without_attention(self, hidden: Tensor, substitute: Substitute | None) -> Tensor:
        """Return what leaves the layer when no row attends, [batch, rows, width]."""
        return self.mlp(self.attention.replaced(hidden, substitute))  # type: ignore[no-any-return]

    def without_mlp(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Return what leaves the layer when all rows attend, causally, and no more happens."""
        return self.attention(  # type: ignore[no-any-return]
            hidden,
            hidden.shape[1],
            position_embeddings=position_embeddings,
            attend=CausalAttention(),
            layer=0,  # which one does not matter to it, and would to a compiled function
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what the layer computes as one function, which layers of one form share.

        `forward`, which looks up what is its own, stays as it is.
        """
        self._compute = torch.compile(self._compute, *args, **kwargs)  # type: ignore[method-assign]

    def computed(self) -> tuple[AttentionFunction, Callable[[Tensor], Tensor]]:
        """Return what computes the attention sublayer of rows that all attend, and the MLP's."""
        return self.attention._attend, self.mlp.forward

    def compute_by(self, attention: AttentionFunction, mlp: Callable[[Tensor], Tensor]) -> None:
        """Let other functions compute what `computed` returned."""
        self.attention._attend = attention  # type: ignore[assignment,method-assign]
        self.mlp.forward = mlp  # type: ignore[assignment,method-assign]

        def compute(
            hidden: Tensor,
            attending: int,
            layer: int,
            embeddings: tuple[Tensor, Tensor],
            attend: Attend,
            going_on: Tensor | None = None,
        ) -> Tensor:
            if going_on is not None or attending < hidden.shape[1]:
                rest = (hidden, attending, layer, embeddings, attend, going_on)
                return WrappedLayer._compute(self, *rest)
            return mlp(attention(hidden, embeddings, attend, layer))

        # Where all rows do all, no module is asked for its parts: in steps of few rows that counts.
        self._compute = compute  # type: ignore[method-assign]

    def _compute(
        self,
        hidden: Tensor,
        attending: int,
        layer: int,
        embeddings: tuple[Tensor, Tensor],
        attend: Attend,
        going_on: Tensor | None = None,
    ) -> Tensor:
        """Apply both sublayers, the MLP to the rows that go on, None: all."""
        hidden = self.attention(
            hidden, attending, position_embeddings=embeddings, attend=attend, layer=layer
        )
        return self.mlp(hidden if going_on is None else hidden[:, going_on])  # type: ignore[no-any-return]


class _Layers(nn.ModuleList):
    """Decoder layers. A transformers model takes the slice of all of them in every forward pass,
    which here is the list itself: making one anew takes as long as calling several layers."""

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return super().__getitem__(index)


def wrap(model: PreTrainedModel) -> list[AttentionSublayer]:
    """Rewire `model` in place and return its attention sublayers, in order.

    Afterwards the model runs without transformers' KV cache and masks: attention is what the
    `attend` argument computes (whole causal sequences by default). Wrapping twice is harmless.

    Raises:
        UnknownFamilyError: the model's family is not in the table.
    """
    family = family_of(model.config)
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    decoder.layers = layers = _Layers(decoder.layers)
    for index, layer in enumerate(layers):
        if not isinstance(layer, WrappedLayer):
            layers[index] = WrappedLayer(layer, family, index)
    model.config.use_cache = False
    use_attend(model)
    return [layer.attention for layer in layers]  # type: ignore[misc]


@contextmanager
def watching_layers(model: PreTrainedModel, note: LayerNote) -> Iterator[None]:
    """Tell `note` of every layer's call in `model`'s forward passes, as long as this lasts."""

    def tell(index: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        note(index, args[0] if args else named["hidden_states"], named["position_embeddings"])

    layers: Sequence[nn.Module] = model.get_decoder().layers  # type: ignore[no-untyped-call]
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, named, index=index: tell(index, args, named), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def computing_layers(
    model: PreTrainedModel, causal: Callable[[WrappedLayer, Tensor, tuple[Tensor, Tensor]], Tensor]
) -> Iterator[None]:
    """Let another function compute `WrappedLayer.causal` in `model`'s forward passes, as long as
    this lasts; all rows of them attend."""
    layers: Sequence[Any] = model.get_decoder().layers  # type: ignore[no-untyped-call]
    for each in layers:
        each._compute = lambda hidden, _rows, _index, embeddings, _attend, layer=each: causal(
            layer, hidden, embeddings
        )
    try:
        yield
    finally:
        for each in layers:
            del each._compute


class KeptRows(TypedDict):
    """What is said to a wrapped model in a forward call: rows per layer."""

    attending_rows: Sequence[int]
    mlp_rows: Sequence[int] | None
    """None: all rows everywhere."""


def rows_attending(layers: int, rows: int, dropped: Collection[int]) -> list[int]:
    """Return `attending_rows` for a batch in which every row drops the same layers' attention."""
    return [0 if layer in dropped else rows for layer in range(layers)]


def rows_kept(layers: int, rows: int, dropped: Sublayers) -> KeptRows:
    """Return what to say for a batch in which every row drops the same sublayers."""
    return {
        "attending_rows": rows_attending(layers, rows, dropped.attention),
        "mlp_rows": rows_attending(layers, rows, dropped.mlps) if dropped.mlps else None,
    }


def last_rows(
    attending_rows: Sequence[int],
    mlp_rows: Sequence[int] | None,
    rows: int,
    with_logits: Tensor | None,
) -> Last | None:
    """Return where rows of a batch of `rows` end that are not among those with logits (None: all
    are). None if nothing ends, or if some rows drop MLPs, which are counted in the rows' order."""
    if with_logits is None or mlp_rows is not None or not 0 < len(with_logits) < rows:
        return None
    attends = [layer for layer, count in enumerate(attending_rows) if count]
    return Last(attends[-1], with_logits) if attends else None


def _part(layer: nn.Module, name: str | None) -> nn.Module:
    part = nn.Identity() if name is None else getattr(layer, name)
    assert isinstance(part, nn.Module)
    return part


def _multiplier(layer: nn.Module, family: Family) -> float:
    return 1.0 if family.residual_multiplier is None else getattr(layer, family.residual_multiplier)


def _add(hidden: Tensor, delta: Tensor, multiplier: float) -> Tensor:
    return hidden + delta if multiplier == 1.0 else hidden + delta * multiplier
