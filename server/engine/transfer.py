"""Moving small arrays to the device and back without waiting for what it computes.

A copy from ordinary memory makes the host wait for the device; one from page-locked memory joins
its queue. torch's pool of page-locked memory keeps a piece until the copy out of it is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED = 4
"""Elements of int32: 16 bytes."""


def upload(
    values: Sequence[Any] | NDArray[Any], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the values on the device, in stream order."""
    host = torch.as_tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def upload_together(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Return vectors of integers on the device as int32, by one copy for all of them.

    Each starts at a multiple of ALIGNED elements, so that kernels see one alignment.
    """
    starts = aligned_starts([len(array) for array in arrays])
    joined = np.zeros(starts[-1], dtype=np.int32)
    for start, array in zip(starts, arrays, strict=False):
        joined[start : start + len(array)] = array
    moved = upload(joined, torch.int32, device)
    return [moved[start : start + len(array)] for start, array in zip(starts, arrays, strict=False)]


def aligned_starts(sizes: Sequence[int]) -> list[int]:
    """Return where pieces of these sizes start in one vector, and last where it ends."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNED) * ALIGNED)
    return starts


def download(tensor: Tensor) -> Tensor:
    """Return a copy in host memory that is complete once the device gets there."""
    return tensor.to("cpu", non_blocking=True, copy=True)
