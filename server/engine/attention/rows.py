"""A backend for a CPU: one native call a layer, no gathered copies.

Needs bfloat16 pages in host memory and native functions (server/engine/native.py). Steps with
chunks of several rows need heads of a multiple of CHUNK_DIM and no soft-capping; other such steps
are the reference's, whose pages it shares.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pruning.attention import AttentionForm
from pruning.variants import Variants
from server.engine.attention.sdpa import SdpaBackend
from server.engine.attention.views import layer_views
from server.engine.batch import Batch, GroupRows
from server.engine.native import NativeFunctions, StepTables, layer_pages
from server.engine.pages import PageLayout

_Arrays = tuple[NDArray[np.int64] | NDArray[np.int32], ...]


class RowsBackend:
    """Attention over pages by native code."""

    def __init__(
        self,
        native: NativeFunctions,
        pool: Tensor,
        layout: PageLayout,
        variants: Variants,
        kv_heads: int,
    ) -> None:
        """pool is [pages, page_elements] in bfloat16, in host memory."""
        self._native = native
        self._reference = SdpaBackend(pool, layout, variants, kv_heads)
        self._views = layer_views(pool, layout, variants, kv_heads)
        self.pages = {layer: layer_pages(*views) for layer, views in self._views.items()}
        self.group_of = variants.group_of_layer
        self._batch: Batch | None = None
        self._arrays: list[_Arrays] = []
        """What the tables are the addresses of."""
        self.tables: ctypes.Array[StepTables] = (StepTables * 0)()
        """A step's, by layer group."""
        self.has_chunks = False
        """Whether a sequence of the step has several rows."""
        self._for_reference: Batch | None = None
        """A step with chunks that the reference was not told of yet."""

    def prepare(self, batch: Batch) -> None:
        if batch is self._batch and all(map(_holds, self._arrays, batch.groups)):
            return  # it has been counted on where it lies
        self._batch = batch
        self._arrays = [_arrays(group, batch) for group in batch.groups]
        tables = map(_tables, batch.groups, self._arrays)
        self.tables = (StepTables * len(self._arrays))(*tables)
        self.has_chunks = len(batch.token_ids) > len(batch.sequences)
        self._for_reference = batch if self.has_chunks else None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        tables, pages = self.tables[self.group_of[layer]], self.pages[layer]
        if not self.has_chunks:
            return self._native.attend(query, key, value, form, pages, tables)
        if self._native.attends_chunks(form, query.shape[-1]):
            return self._native.attend_chunks(query, key, value, form, pages, tables)
        if self._for_reference is not None:
            self._reference.prepare(self._for_reference)
            self._for_reference = None
        return self._reference(layer, query, key, value, form)


def _holds(arrays: _Arrays, group: GroupRows) -> bool:
    """Return whether a group's block tables are where they were."""
    return arrays[1] is group.pages


def _arrays(group: GroupRows, batch: Batch) -> _Arrays:
    return (group.slots, group.pages, group.table_starts, batch.lengths, batch.query_starts)


def _tables(group: GroupRows, arrays: _Arrays) -> StepTables:
    return StepTables(group.sequences, *(array.ctypes.data for array in arrays))
