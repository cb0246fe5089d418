"""Products of many rows with weights in eight bits, on tensor cores through cuBLAS.

Two ways, chosen at each call. A weight in float8 is multiplied as it is, if the device can, with
the rows put into float8 as well, each by a scale of its own::

    y = (x8 @ weight8.T) * x_scale * scale

Any other is written out in x's dtype first, for some outputs at a time, so that what is written
stays small.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_BAND = 8192
"""Outputs that are written out at a time."""
_LARGEST: tl.constexpr = tl.constexpr(448)
"""In float8 e4m3."""
_LEAST = (8, 9)
"""Compute capability from which on tensor cores multiply float8."""


@triton.jit
def _expand(weight, scale, y, inputs, weight_row, INPUTS: tl.constexpr):  # fmt: skip
    """One program: a piece of an output's weights."""
    output = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    numbers = tl.load(weight + output * weight_row + at, at < inputs).to(tl.float32)
    numbers *= tl.load(scale + output)
    tl.store(y + output * inputs + at, numbers.to(y.dtype.element_ty), at < inputs)


@triton.jit
def _round_rows(x, y, scale, inputs, x_row, INPUTS: tl.constexpr):  # fmt: skip
    """One program: a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, INPUTS)
    numbers = tl.load(x + row * x_row + at, at < inputs, 0.0).to(tl.float32)
    step = tl.max(tl.abs(numbers), 0) / _LARGEST
    step = tl.where(step > 0, step, 1.0)
    tl.store(scale + row, step)
    tl.store(y + row * inputs + at, (numbers / step).to(y.dtype.element_ty), at < inputs)


def scaled_linear(x: Tensor, weight: Tensor, added: Tensor | None, scale: Tensor) -> Tensor:
    """Return x @ (weight * scale).T + added; the arguments are those of `linear.linear`."""
    if multiplies(x, weight):
        return _float8_linear(x, weight, added, scale)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    bands = range(0, weight.shape[0], _BAND)
    for band in (slice(start, start + _BAND) for start in bands):
        wide = expanded(weight[band], scale[band], x.dtype)
        if added is None:
            torch.mm(x, wide.t(), out=y[:, band])
        else:
            torch.addmm(added[..., band], x, wide.t(), out=y[:, band])
    return y


def expanded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [outputs, inputs] times its scales [outputs], in another dtype."""
    outputs, inputs = weight.shape
    y = torch.empty(outputs, inputs, dtype=dtype, device=weight.device)
    _expand[(outputs, triton.cdiv(inputs, 4096))](
        weight, scale, y, inputs, weight.stride(0), min(4096, triton.next_power_of_2(inputs))
    )
    return y


def in_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [rows, inputs] in float8 and their scales [rows, 1] in float32."""
    rows, inputs = x.shape
    y = torch.empty(rows, inputs, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _round_rows[(rows,)](
        x, y, scale, inputs, x.stride(0), triton.next_power_of_2(inputs), num_warps=8
    )
    return y, scale


def _float8_linear(x: Tensor, weight: Tensor, added: Tensor | None, scale: Tensor) -> Tensor:
    x8, x_scale = in_float8(x)
    y: Tensor = torch._scaled_mm(
        x8, weight.t(), x_scale, scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y if added is None else y.add_(added)


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Return whether torch multiplies both in float8, which it does for multiples of 16."""
    if x.dtype != torch.bfloat16 or weight.dtype != torch.float8_e4m3fn or x.shape[0] == 0:
        return False
    return all(size % 16 == 0 for size in weight.shape) and _has_float8(x.device)


@lru_cache
def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST
