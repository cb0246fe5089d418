"""The border between a family's own attention module and whatever computes the attention.

transformers lets an attention implementation be chosen by name. The name `attndrop` is registered
here: it hands each layer's queries, keys and values (after the family's own projections, norms
and RoPE) to the `Attend` function that the caller passed to `model(..., attend=...)`. So a dense
calibration pass, a sampling loop and the serving engine's paged KV cache all run through the same
unchanged family code. Knows nothing of pages, requests or variants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

IMPLEMENTATION = "attndrop"


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What the softmax of one layer looks like."""

    scaling: float
    sliding_window: int | None = None
    """A query at position p sees keys at positions > p - sliding_window."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap), as in Gemma 2."""


class Attend(Protocol):
    """Computes causal attention for one layer.

    query is [batch, heads, rows, head_dim]; key and value are [batch, kv_heads, rows, head_dim],
    already rotated, one per query. Returns [batch, rows, heads, head_dim].
    """

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor: ...


def use_attend(model: PreTrainedModel) -> None:
    """Make `model` take its attention from the `attend` argument of its forward call."""
    AttentionInterface.register(IMPLEMENTATION, _bridge)
    model.set_attn_implementation(IMPLEMENTATION)


def _bridge(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Attend,
    layer: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    form = AttentionForm(scaling, sliding_window, softcap)
    return attend(layer, query, key, value, form), None


class CausalAttention:
    """Whole sequences, nothing kept: row i of each batch entry sees rows 0 to i."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        return masked_attention(query, key, value, form)


class GrowingAttention:
    """A dense KV cache for a batch of equally long sequences that grow together."""

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        if layer in self._keys:
            key = torch.cat([self._keys[layer], key], dim=2)
            value = torch.cat([self._values[layer], value], dim=2)
        self._keys[layer], self._values[layer] = key, value
        return masked_attention(query, key, value, form)


class PaddedAttention:
    """A dense KV cache for a batch of sequences that grow together, padded on the left.

    Row i of the batch begins at column `padding[i]`. What stands before it is seen by itself alone,
    which keeps it finite; nothing else sees it.
    """

    def __init__(self, padding: Tensor) -> None:
        """padding is [batch, 1], the columns before each sequence, on the model's device."""
        self._padding = padding
        self._padded = bool(padding.any())
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        if layer in self._keys:
            key = torch.cat([self._keys[layer], key], dim=2)
            value = torch.cat([self._values[layer], value], dim=2)
        self._keys[layer], self._values[layer] = key, value
        if not self._padded:
            return masked_attention(query, key, value, form)
        rows, length = query.shape[2], key.shape[2]
        columns = torch.arange(length, device=query.device)
        itself = columns == columns[length - rows :, None]
        visible = causal_mask(rows, length, form.sliding_window, query.device)
        visible = (visible & (columns >= self._padding)[:, None]) | itself
        return biased_attention(query, key, value, visible[:, None], form)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, form: AttentionForm) -> Tensor:
    """Causal attention of the last rows of a sequence over all of it.

    query is [batch, heads, rows, head_dim], key and value [batch, kv_heads, length, head_dim] with
    length >= rows; query row i stands at position length - rows + i. Returns
    [batch, rows, heads, head_dim].
    """
    rows, length = query.shape[2], key.shape[2]
    if rows == 1 and form.sliding_window is not None:
        key, value = key[:, :, -form.sliding_window :], value[:, :, -form.sliding_window :]
    mask = None if rows == 1 else causal_mask(rows, length, form.sliding_window, query.device)
    return biased_attention(query, key, value, mask, form)


def causal_mask(rows: int, length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Return [rows, length], true where the row (counted from the end) may look."""
    positions = torch.arange(length - rows, length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None, :]
    visible = keys <= positions
    if sliding_window is not None:
        visible &= keys > positions - sliding_window
    return visible


def biased_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, form: AttentionForm
) -> Tensor:
    """Attention under a boolean mask, [rows, length] or [batch, 1, rows, length].

    Shapes as in `masked_attention`; `visible` None means that every key is seen.
    """
    if form.softcap is None:
        if query.shape[2] == 1:
            return _one_row(query, key, value, visible, form)
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=form.scaling, enable_gqa=True
        )
        return out.transpose(1, 2)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * form.scaling
    scores = form.softcap * torch.tanh(scores / form.softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2)


def _one_row(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, form: AttentionForm
) -> Tensor:
    """Attention of one row a sequence: heads that share keys are attended like rows of one head.

    On a CPU this reads each key once instead of once a head, and is up to seven times as fast.
    """
    grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))  # type: ignore[no-untyped-call]
    out = functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=visible, scale=form.scaling
    )
    return out.flatten(1, 2)[:, None]
