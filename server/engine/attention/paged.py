"""The backend for CUDA devices: attention straight from the page pool, by Triton kernels.

Needs a CUDA device and Triton, which comes with torch's CUDA builds. Sequences with one row are
attended by the split decode kernel, longer chunks by the chunk kernel; nothing is copied out of
the pages, and nothing is planned on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.attention import AttentionForm
from pruning.variants import Variants
from server.engine.attention.kernels import attend_chunks, decode, write_pages
from server.engine.attention.views import layer_views
from server.engine.batch import Batch, GroupRows
from server.engine.pages import PageLayout
from server.engine.transfer import upload_together

_UNBOUNDED = 1 << 30
"""A window that sees everything."""
_PROGRAMS = 512
"""Programs of the decode kernel that fill a device of 132 multiprocessors."""
_MOST_SPLITS = 32
_SPLIT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Singles:
    """The sequences with one row; vectors of int32 on the device."""

    table_starts: Tensor
    """Where each one's block table starts among the pages."""
    rows: Tensor
    lengths: Tensor
    """0 for padding."""
    longest: int
    """No sequence is longer than this."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """The sequences with more rows; vectors of int32 on the device."""

    sequences: Tensor
    table_starts: Tensor
    """Of all sequences, and so the next two."""
    starts: Tensor
    lengths: Tensor
    longest: int
    """Rows of the longest chunk."""


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One layer group's share of a step, on the device, in int32."""

    slots: Tensor
    """[rows] where keys and values go; -1 for padding."""
    pages: Tensor
    """Block tables."""
    singles: Singles | None
    chunks: Chunks | None


class PagedBackend:
    """Attention over pages without gathering."""

    def __init__(self, pool: Tensor, layout: PageLayout, variants: Variants, kv_heads: int) -> None:
        """pool is [pages, page_elements] in the KV dtype, on a CUDA device."""
        self._views = layer_views(pool, layout, variants, kv_heads)
        self._group_of = variants.group_of_layer
        self._kv_heads = kv_heads
        self._device = pool.device
        self._step: Sequence[GroupStep | None] = ()

    def prepare(self, batch: Batch) -> None:
        self.bind([self._prepare(group, batch) if group.rows else None for group in batch.groups])

    def bind(self, groups: Sequence[GroupStep | None]) -> None:
        """Attend by these device tensors from now on, one entry per layer group."""
        self._step = groups

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        step = self._step[self._group_of[layer]]
        assert step is not None, "a layer without attending rows was run"
        keys, values = self._views[layer]
        rows, key, value = _by_row(query), _by_row(key), _by_row(value)
        if step.chunks is not None:
            write_pages(key, value, keys, values, step.slots)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        window = form.sliding_window or _UNBOUNDED
        softcap = form.softcap or 0.0
        if (single := step.singles) is not None:
            decode(
                rows, key, value, keys, values,
                step.pages, single.table_starts, single.rows, step.slots, single.lengths, out,
                writes=step.chunks is None, scaling=form.scaling, window=window, softcap=softcap,
                splits=_splits(len(single.rows) * self._kv_heads, single.longest),
            )  # fmt: skip
        if (chunk := step.chunks) is not None:
            attend_chunks(
                rows, keys, values,
                step.pages, chunk.table_starts, chunk.sequences, chunk.starts, chunk.lengths, out,
                longest=chunk.longest, scaling=form.scaling, window=window, softcap=softcap,
            )  # fmt: skip
        return out[None]

    def _prepare(self, group: GroupRows, batch: Batch) -> GroupStep:
        starts, lengths = batch.query_starts, batch.lengths[: group.sequences]
        counts = starts[1 : group.sequences + 1] - starts[: group.sequences]
        (single,), (chunk,) = (counts == 1).nonzero(), (counts > 1).nonzero()
        tables = group.table_starts[:-1]
        slots, pages, *rest = upload_together(
            [
                group.slots, group.pages,
                tables[single], starts[single], lengths[single],
                chunk, tables, starts, lengths,
            ],
            self._device,
        )  # fmt: skip
        singles = chunks = None
        if len(single):
            table_starts, rows, seen = rest[:3]
            singles = Singles(table_starts, rows, seen, longest=int(lengths[single].max()))
        if len(chunk):
            sequences, table_starts, firsts, seen = rest[3:]
            longest = int(counts[chunk].max())
            chunks = Chunks(sequences, table_starts, firsts, seen, longest)
        return GroupStep(slots, pages, singles, chunks)


def _by_row(heads: Tensor) -> Tensor:
    """Return [1, heads, rows, dim] as [rows, heads, dim] with contiguous dim, without a copy."""
    rows = heads[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _splits(programs: int, longest: int) -> int:
    """Return into how many parts to cut each sequence: a power of two that fills the device."""
    wanted = min(_PROGRAMS // programs, _MOST_SPLITS, -(-longest // _SPLIT_TOKENS))
    return 1 << max(0, wanted.bit_length() - 1)
