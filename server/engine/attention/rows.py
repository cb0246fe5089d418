"""A backend for a CPU: one native call a layer, no gathered copies.

Needs bfloat16 pages in host memory and native functions (server/engine/native.py). Steps with
chunks of several rows need heads of a multiple of CHUNK_DIM and no soft-capping; other such steps
are the reference's, whose pages it shares.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One layer group's share of a step."""

    tables: StepTables
    arrays: tuple[NDArray[np.int64] | NDArray[np.int32], ...]
    """What the tables are the addresses of."""


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
        self._pages = {layer: layer_pages(*views) for layer, views in self._views.items()}
        self._group_of = variants.group_of_layer
        self._batch: Batch | None = None
        self._prepared: list[_Prepared] = []
        self._has_chunks = False
        self._for_reference: Batch | None = None
        """A step with chunks that the reference was not told of yet."""

    def prepare(self, batch: Batch) -> None:
        if batch is self._batch and all(map(_holds, self._prepared, batch.groups)):
            return  # it has been counted on where it lies
        self._batch = batch
        self._prepared = [_prepared(group, batch) for group in batch.groups]
        self._has_chunks = len(batch.token_ids) > len(batch.sequences)
        self._for_reference = batch if self._has_chunks else None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        tables, pages = self._prepared[self._group_of[layer]].tables, self._pages[layer]
        if not self._has_chunks:
            return self._native.attend(query, key, value, form, pages, tables)
        if self._native.attends_chunks(form, query.shape[-1]):
            return self._native.attend_chunks(query, key, value, form, pages, tables)
        if self._for_reference is not None:
            self._reference.prepare(self._for_reference)
            self._for_reference = None
        return self._reference(layer, query, key, value, form)


def _holds(prepared: _Prepared, group: GroupRows) -> bool:
    """Return whether a group's block tables are where they were."""
    return prepared.arrays[1] is group.pages


def _prepared(group: GroupRows, batch: Batch) -> _Prepared:
    arrays = (group.slots, group.pages, group.table_starts, batch.lengths, batch.query_starts)
    addresses = (array.ctypes.data for array in arrays)
    return _Prepared(StepTables(group.sequences, *addresses), arrays)
