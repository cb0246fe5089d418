"""An attention backend as one opaque operator, so that layers are compiled around it.

torch's operators take tensors and numbers, so the operator finds its backend by a number. The
table that holds the backends is the one module-level state of the engine, and lets go of a backend
with its engine.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

from torch import Tensor

from pruning.attention import AttentionForm
from server.engine.attention import AttentionBackend
from server.engine.operators import operator

_backends: WeakValueDictionary[int, AttentionBackend] = WeakValueDictionary()
_handles = count()


class OperatorAttend:
    """An `Attend` that a compiler leaves as it is."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self._handle = next(_handles)
        _backends[self._handle] = backend

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        return attend(
            query, key, value, self._handle, layer, form.scaling, form.sliding_window, form.softcap
        )


def _shape(query: Tensor, *others: object) -> Tensor:
    _, heads, rows, dim = query.shape
    return query.new_empty(1, rows, heads, dim)


@operator(_shape)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: int,
    layer: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    form = AttentionForm(scaling, sliding_window, softcap)
    return _backends[handle](layer, query, key, value, form)
