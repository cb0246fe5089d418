"""An attention backend as one opaque operator, so that layers are compiled around it.

torch's operators take tensors and numbers, so the operator finds its backend by a number. The
table that holds the backends is the one module-level state of the engine, and lets go of a backend
with its engine.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from pruning.attention import AttentionForm
from server.engine.attention.kernels import Angles
from server.engine.operators import operator


class RotatingBackend(Protocol):
    """A backend that may be left to rotate queries and keys."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm,
        angles: Angles | None = None,
    ) -> Tensor: ...


_backends: WeakValueDictionary[int, RotatingBackend] = WeakValueDictionary()
_handles = count()


class OperatorAttend:
    """An `Attend` that a compiler leaves as it is."""

    def __init__(self, backend: RotatingBackend) -> None:
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
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Attend by the backend of this number. cos and sin, [1, rows, head_dim], are there where
    queries and keys have not been rotated yet (compiling.py)."""
    form = AttentionForm(scaling, sliding_window, softcap)
    angles = None if cos is None or sin is None else Angles(cos[0], sin[0])
    return _backends[handle](layer, query, key, value, form, angles)
