"""How many multiprocessors a device has, what a kernel's program finds on one, and what its copy
engine takes."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from server.engine.early import launches_early

_SHARED_MEMORY, _MULTIPROCESSORS = 227 << 10, 132
"""Where kernels are interpreted: as on an H100, whose ways are tested then."""
_ALIGNED = 16
"""Bytes that what a descriptor describes begins at, and its rows are apart, in multiples of."""


BOXES = (64, 128)
"""Rows that the copy engine brings at once. It takes an eighth longer where a box reaches beyond
the last row (docs/performance.md)."""


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes that one program may take."""
    if device.type != "cuda":
        return _SHARED_MEMORY
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many a device has."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def stages(most: int, bytes_of_one: int, device: torch.device) -> int:
    """Return the steps whose tiles are on their way from memory at once: `most`, as far as there is
    room, and two at least."""
    return max(2, min(most, shared_memory(device) // bytes_of_one))


def is_describable(x: Tensor) -> bool:
    """Return whether a tensor descriptor can describe x, by which the copy engine brings it."""
    apart = x.stride(0) * x.itemsize
    return x.stride(-1) == 1 and x.data_ptr() % _ALIGNED == 0 and apart % _ALIGNED == 0


def copies(x: Tensor, weight: Tensor) -> bool:
    """Return whether x's device has a copy engine that brings both, in 16 bits."""
    fits = launches_early(x.device) and x.itemsize == weight.itemsize == 2
    return fits and is_describable(x) and is_describable(weight)


def box_of(rows: int) -> int:
    """Return the smallest of BOXES that holds so many rows."""
    return next(box for box in BOXES if rows <= box)
