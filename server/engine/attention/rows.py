"""A backend for steps of single rows on a CPU: one native call a layer, no gathered copies.

Needs bfloat16 pages in host memory and native functions (server/engine/native.py). Any step with a
chunk of several rows is the reference's, whose pages it shares.
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
from server.engine.native import NativeFunctions, RowTables, layer_pages
from server.engine.pages import PageLayout


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One layer group's share of a step."""

    tables: RowTables
    arrays: tuple[NDArray[np.int64] | NDArray[np.int32], ...]
    """What the tables are the addresses of."""


class RowsBackend:
    """Attention of single rows over pages by native code."""

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
        self._prepared: list[_Prepared] | None = None

    def prepare(self, batch: Batch) -> None:
        if len(batch.token_ids) > len(batch.sequences):
            self._prepared = None
            self._reference.prepare(batch)
        else:
            self._prepared = [_prepared(group, batch) for group in batch.groups]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        if self._prepared is None:
            return self._reference(layer, query, key, value, form)
        tables = self._prepared[self._group_of[layer]].tables
        return self._native.attend(query, key, value, form, self._pages[layer], tables)


def _prepared(group: GroupRows, batch: Batch) -> _Prepared:
    arrays = (group.slots, group.pages, group.table_starts, batch.lengths)
    slots, table, starts, lengths = (array.ctypes.data for array in arrays)
    return _Prepared(RowTables(group.rows, slots, table, starts, lengths), arrays)
