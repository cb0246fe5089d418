"""The reference backend: gather pages, then torch's scaled_dot_product_attention.

Runs on any device and for every family. Sequences with one row are gathered into one padded
batch; each longer chunk is attended on its own. Needs nothing but torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pruning.attention import AttentionForm, biased_attention, masked_attention
from pruning.variants import Variants
from server.engine.attention.eight_bits import E4M3, packed, unpacked
from server.engine.attention.views import layer_views
from server.engine.batch import Batch, GroupRows
from server.engine.pages import PageLayout


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A sequence with more than one row in this step."""

    start: int
    end: int
    length: int
    table: Tensor


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One layer group's share of a step, on the device."""

    pages: Tensor
    offsets: Tensor
    single_rows: Tensor
    """Rows of the sequences that have one row."""
    single_tables: Tensor
    single_lengths: Tensor
    single_span: int
    """The longest of `single_lengths`."""
    are_equal: bool
    """Whether all of `single_lengths` are the same."""
    chunks: tuple[_Chunk, ...]
    masks: dict[int | None, Tensor | None]
    """By sliding window: what `single_rows` see, made for the first layer that needs it."""


class SdpaBackend:
    """Attention over pages by gathering."""

    def __init__(self, pool: Tensor, layout: PageLayout, variants: Variants, kv_heads: int) -> None:
        """pool is [pages, page_elements] in the model's dtype or E4M3, on the device."""
        self._packs = pool.dtype == E4M3
        stored = pool.view(torch.uint8) if self._packs else pool
        self._views = layer_views(stored, layout, variants, kv_heads)
        self._group_of = variants.group_of_layer
        self._layout = layout
        self._device = pool.device
        self._prepared: list[_Prepared | None] = []

    def prepare(self, batch: Batch) -> None:
        self._prepared = [
            self._prepare(index, group, batch) if group.rows else None
            for index, group in enumerate(batch.groups)
        ]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        step = self._prepared[self._group_of[layer]]
        assert step is not None, "a layer without attending rows was run"
        keys, values = self._views[layer]
        keys[step.pages, step.offsets] = self._stored(key[0].transpose(0, 1))
        values[step.pages, step.offsets] = self._stored(value[0].transpose(0, 1))
        if not step.chunks:
            return _attend_singles(step, query[0].transpose(0, 1), keys, values, form)[None]
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        if len(step.single_rows):
            rows = query[0].transpose(0, 1)[step.single_rows]
            out[0, step.single_rows] = _attend_singles(step, rows, keys, values, form)
        for chunk in step.chunks:
            out[:, chunk.start : chunk.end] = _attend_chunk(chunk, query, keys, values, form)
        return out

    def _stored(self, rows: Tensor) -> Tensor:
        return packed(rows) if self._packs else rows

    def _prepare(self, index: int, group: GroupRows, batch: Batch) -> _Prepared:
        tokens = self._layout.tokens_per_page[index]
        starts, lengths = batch.query_starts, batch.lengths[: group.sequences]
        counts = starts[1 : group.sequences + 1] - starts[: group.sequences]
        slots = self._to_device(group.slots)
        tables = self._to_device(_padded(group))
        singles = (counts == 1).nonzero()[0]
        span = int(lengths[singles].max()) if len(singles) else 0
        return _Prepared(
            pages=slots // tokens,
            offsets=slots % tokens,
            single_rows=self._to_device(starts[singles]),
            single_tables=tables[self._to_device(singles), : -(-span // tokens)],
            single_lengths=self._to_device(lengths[singles]),
            single_span=span,
            are_equal=bool((lengths[singles] == span).all()),
            masks={},
            chunks=tuple(
                _Chunk(
                    int(starts[i]),
                    int(starts[i + 1]),
                    int(lengths[i]),
                    tables[i, : -(-int(lengths[i]) // tokens)],
                )
                for i in (counts > 1).nonzero()[0]
            ),
        )

    def _to_device(self, array: object) -> Tensor:
        return torch.as_tensor(array, device=self._device)


def _padded(group: GroupRows) -> NDArray[np.int64]:
    """Return the block tables as [sequences, pages], padded with page 0."""
    lengths = np.diff(group.table_starts)
    tables = np.zeros((group.sequences, lengths.max(initial=0)), dtype=np.int64)
    tables[np.arange(tables.shape[1]) < lengths[:, None]] = group.pages
    return tables


def _attend_singles(
    step: _Prepared, rows: Tensor, keys: Tensor, values: Tensor, form: AttentionForm
) -> Tensor:
    """Attend the sequences with one row, as one padded batch; rows and what is returned are
    [sequences, heads, dim]."""
    span = step.single_span
    if form.sliding_window not in step.masks:
        step.masks[form.sliding_window] = _visible(step, form.sliding_window)
    out = biased_attention(
        rows[:, :, None],
        _gather(keys, step.single_tables, span, rows.dtype),
        _gather(values, step.single_tables, span, rows.dtype),
        step.masks[form.sliding_window],
        form,
    )
    return out[:, 0]


def _visible(step: _Prepared, window: int | None) -> Tensor | None:
    """Return what rows of their own see, [sequences, 1, 1, span]; None if that is everything."""
    if step.are_equal and (window is None or window >= step.single_span):
        return None
    lengths = step.single_lengths[:, None]
    positions = torch.arange(step.single_span, device=lengths.device)
    visible = positions < lengths
    if window is not None:
        visible &= positions >= lengths - window
    return visible[:, None, None]


def _attend_chunk(
    chunk: _Chunk, query: Tensor, keys: Tensor, values: Tensor, form: AttentionForm
) -> Tensor:
    """Attend one sequence's rows over all of its tokens; return [1, rows, heads, dim]."""
    return masked_attention(
        query[:, :, chunk.start : chunk.end],
        _gather(keys, chunk.table[None], chunk.length, query.dtype),
        _gather(values, chunk.table[None], chunk.length, query.dtype),
        form,
    )


def _gather(view: Tensor, tables: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Copy [sequences, pages] pages out of [pages, tokens, kv_heads, dim], which hold `dtype` or
    bytes, into [sequences, kv_heads, length, dim]."""
    # Several times as fast as indexing, which copies element by element.
    pages = view.index_select(0, tables.flatten())
    if pages.dtype == torch.uint8:
        pages = unpacked(pages, dtype)
    whole = pages.view(len(tables), -1, *view.shape[2:])
    return whole[:, :length].transpose(1, 2)
