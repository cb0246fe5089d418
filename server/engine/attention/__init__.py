"""Attention over pages: one narrow protocol, one file per backend.

A backend is an `Attend` function (pruning/attention.py) over the page pool: given one layer's
rotated queries, keys and values for the attending rows, it writes the keys and values into their
pages and returns the outputs. What does not change between layers is prepared once a step.
`sdpa` is the reference and runs anywhere; other backends are tested against it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pruning.attention import AttentionForm
from server.engine.batch import Batch


class AttentionBackend(Protocol):
    """Computes the attention of one step, layer by layer."""

    def prepare(self, batch: Batch) -> None:
        """Move a step's page tables and lengths to the device, once for all layers."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        """Write key and value [1, kv_heads, rows, head_dim] and attend with query
        [1, heads, rows, head_dim] over the pages; return [1, rows, heads, head_dim]."""
