"""The backend for CUDA devices: attention straight from the page pool, by Triton kernels.

Needs a CUDA device and Triton, which comes with torch's CUDA builds. Sequences with one row are
attended by the split decode kernel, longer chunks by the chunk kernel; nothing is copied out of
the pages, and nothing is planned on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.attention import AttentionForm
from pruning.variants import Variants
from server.engine.attention.kernels import attend_chunks, decode, write_pages
from server.engine.attention.views import layer_views
from server.engine.batch import Batch, GroupRows
from server.engine.pages import PageLayout

_UNBOUNDED = 1 << 30
"""A window that sees everything."""
_PROGRAMS = 512
"""Programs of the decode kernel that fill a device of 132 multiprocessors."""
_MOST_SPLITS = 32
_SPLIT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _Singles:
    """The sequences with one row."""

    tables: Tensor
    rows: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The sequences with more rows."""

    tables: Tensor
    sequences: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    """Rows of the longest chunk."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One layer group's share of a step, on the device, in int32."""

    slots: Tensor
    singles: _Singles | None
    chunks: _Chunks | None


class PagedBackend:
    """Attention over pages without gathering."""

    def __init__(self, pool: Tensor, layout: PageLayout, variants: Variants, kv_heads: int) -> None:
        """pool is [pages, page_elements] in the KV dtype, on a CUDA device."""
        self._views = layer_views(pool, layout, variants, kv_heads)
        self._group_of = {
            layer: index for index, group in enumerate(variants.groups) for layer in group.layers
        }
        self._kv_heads = kv_heads
        self._device = pool.device
        self._prepared: list[_Prepared | None] = []

    def prepare(self, batch: Batch) -> None:
        self._prepared = [
            self._prepare(group, batch) if group.rows else None for group in batch.groups
        ]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        step = self._prepared[self._group_of[layer]]
        assert step is not None, "a layer without attending rows was run"
        keys, values = self._views[layer]
        write_pages(_by_row(key), _by_row(value), keys, values, step.slots)
        rows = _by_row(query)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        window = form.sliding_window or _UNBOUNDED
        softcap = form.softcap or 0.0
        if (single := step.singles) is not None:
            decode(
                rows, keys, values, single.tables, single.rows, single.lengths, out,
                scaling=form.scaling, window=window, softcap=softcap,
                splits=_splits(len(single.rows) * self._kv_heads, single.longest),
            )  # fmt: skip
        if (chunk := step.chunks) is not None:
            attend_chunks(
                rows, keys, values, chunk.tables, chunk.sequences, chunk.starts, chunk.lengths, out,
                longest=chunk.longest, scaling=form.scaling, window=window, softcap=softcap,
            )  # fmt: skip
        return out[None]

    def _prepare(self, group: GroupRows, batch: Batch) -> _Prepared:
        starts, lengths = batch.query_starts, batch.lengths[: group.sequences]
        counts = starts[1 : group.sequences + 1] - starts[: group.sequences]
        (single,), (chunk,) = (counts == 1).nonzero(), (counts > 1).nonzero()
        singles = chunks = None
        if len(single):
            singles = _Singles(
                tables=self._to_device(group.block_table[single]),
                rows=self._to_device(starts[single]),
                lengths=self._to_device(lengths[single]),
                longest=int(lengths[single].max()),
            )
        if len(chunk):
            chunks = _Chunks(
                tables=self._to_device(group.block_table),
                sequences=self._to_device(chunk),
                starts=self._to_device(starts),
                lengths=self._to_device(lengths),
                longest=int(counts[chunk].max()),
            )
        return _Prepared(self._to_device(group.slots), singles, chunks)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(self._device)


def _by_row(heads: Tensor) -> Tensor:
    """Return [1, heads, rows, dim] as [rows, heads, dim] with contiguous dim, without a copy."""
    rows = heads[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _splits(programs: int, longest: int) -> int:
    """Return into how many parts to cut each sequence: a power of two that fills the device."""
    wanted = min(_PROGRAMS // programs, _MOST_SPLITS, -(-longest // _SPLIT_TOKENS))
    return 1 << max(0, wanted.bit_length() - 1)
