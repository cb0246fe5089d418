"""The backend for CUDA devices: attention straight from the page pool, by Triton kernels.

Needs a CUDA device and Triton, which comes with torch's CUDA builds. Sequences with one row are
attended by the split decode kernel, longer chunks by the chunk kernel, tile by tile (tiles.py);
nothing is copied out of the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.attention import AttentionForm
from pruning.variants import Variants
from server.engine.attention.chunks import attend_chunks
from server.engine.attention.kernels import (
    Angles,
    decode,
    decode_tiling,
    write_pages,
)
from server.engine.attention.tiles import Tiling, choose_tiling, chunk_items
from server.engine.attention.views import layer_views
from server.engine.batch import Batch, GroupRows
from server.engine.multiprocessor import multiprocessors
from server.engine.pages import PageLayout
from server.engine.transfer import upload_together

_MOST_SPLITS = 32
_SPLIT_TOKENS = 64
_OVERHEAD_TOKENS = 64
"""What a program costs beside its tokens, in the time of so many more."""
_USUAL_TOKENS = 2048


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
    """The sequences with more rows; int32 on the device."""

    items: Tensor
    """[items, 4] as tiles.py makes them; sequence -1 for padding."""
    table_starts: Tensor
    """Of all sequences, and so the next two."""
    starts: Tensor
    lengths: Tensor
    tile_rows: int
    parts: int
    """No more than the first so many items are parts of tiles."""


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

    def __init__(
        self, pool: Tensor, layout: PageLayout, variants: Variants, heads: int, kv_heads: int
    ) -> None:
        """pool is [pages, page_elements] in the model's dtype or E4M3, on a CUDA device."""
        self._views = layer_views(pool, layout, variants, kv_heads)
        self._group_of = variants.group_of_layer
        self._heads = heads
        self._kv_heads = kv_heads
        self._device = pool.device
        self._step: Sequence[GroupStep | None] = ()

    def prepare(self, batch: Batch) -> None:
        self.bind([self._prepare(group, batch) if group.rows else None for group in batch.groups])

    def bind(self, groups: Sequence[GroupStep | None]) -> None:
        """Attend by these device tensors from now on, one entry per layer group."""
        self._step = groups

    def tiling(self, rows: int) -> Tiling:
        """Return how chunks are tiled in steps of so many rows, padding included."""
        keys, _ = next(iter(self._views.values()))
        return choose_tiling(rows, self._heads, keys.shape[-1], multiprocessors(self._device))

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm,
        angles: Angles | None = None,
    ) -> Tensor:
        step = self._step[self._group_of[layer]]
        assert step is not None, "a layer without attending rows was run"
        keys, values = self._views[layer]
        rows, key, value = _by_row(query), _by_row(key), _by_row(value)
        if step.chunks is not None:
            key, value = write_pages(key, value, keys, values, step.slots, angles)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        window, softcap = form.sliding_window, form.softcap or 0.0
        if (single := step.singles) is not None:
            decode(
                rows, key, value, keys, values,
                step.pages, single.table_starts, single.rows, step.slots, single.lengths, out,
                writes=step.chunks is None, scaling=form.scaling, window=window, softcap=softcap,
                splits=self._splits(single, rows), angles=angles,
            )  # fmt: skip
        if (chunk := step.chunks) is not None:
            attend_chunks(
                rows, key, value, keys, values,
                step.pages, chunk.table_starts, chunk.items, chunk.starts, chunk.lengths, out,
                tile_rows=chunk.tile_rows, parts=chunk.parts,
                scaling=form.scaling, window=window, softcap=softcap, angles=angles,
            )  # fmt: skip
        return out[None]

    def _splits(self, single: Singles, rows: Tensor) -> int:
        _, heads, dim = rows.shape
        tiling = decode_tiling(heads, self._kv_heads, dim)
        held = tiling.resident * multiprocessors(self._device)
        return choose_splits(len(single.rows) * self._kv_heads, held, single.longest)

    def _prepare(self, group: GroupRows, batch: Batch) -> GroupStep:
        starts, lengths = batch.query_starts, batch.lengths[: group.sequences]
        counts = starts[1 : group.sequences + 1] - starts[: group.sequences]
        (single,), (chunk,) = (counts == 1).nonzero(), (counts > 1).nonzero()
        tables = group.table_starts[:-1]
        tiling = self.tiling(len(batch.token_ids))
        items = chunk_items(chunk, counts[chunk], lengths[chunk], tiling)
        slots, pages, *rest = upload_together(
            [
                group.slots, group.pages,
                tables[single], starts[single], lengths[single],
                items.ravel(), tables, starts, lengths,
            ],
            self._device,
        )  # fmt: skip
        singles = chunks = None
        if len(single):
            table_starts, rows, seen = rest[:3]
            singles = Singles(table_starts, rows, seen, longest=int(lengths[single].max()))
        if len(chunk):
            uploaded, table_starts, firsts, seen = rest[3:]
            parts = int(np.count_nonzero(items[:, 3] > 1))
            chunks = Chunks(uploaded.view(-1, 4), table_starts, firsts, seen, tiling.rows, parts)
        return GroupStep(slots, pages, singles, chunks)


def _by_row(heads: Tensor) -> Tensor:
    """Return [1, heads, rows, dim] as [rows, heads, dim] with contiguous dim, without a copy."""
    rows = heads[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def choose_splits(programs: int, held: int, longest: int) -> int:
    """Return into how many parts to cut each sequence: a power of two, at most 32.

    `programs` of the decode kernel run where nothing is cut, and none sees more than `longest`
    tokens. They run in waves of `held`, as many as the device runs side by side; the last wave
    takes as long as a full one, which more and shorter programs make matter less::

        640 programs, 396 at once, uncut    2 waves of 2048 tokens, the last one mostly idle
        cut in four                         7 waves of 512
    """
    tokens = min(longest, _USUAL_TOKENS)

    def duration(splits: int) -> float:
        waves = -(-programs * splits // held)
        return waves * (tokens / splits + _OVERHEAD_TOKENS)

    wanted = [1 << power for power in range(_MOST_SPLITS.bit_length())]
    return min((s for s in wanted if s == 1 or s * _SPLIT_TOKENS <= tokens), key=duration)
