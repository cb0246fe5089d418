"""Products of many rows with weights in eight bits, on tensor cores through cuBLAS.

Two ways, chosen at each call. A weight in float8 is multiplied as it is, if the device can, with
the rows put into float8 as well, each by a scale of its own::

    y = (x8 @ weight8.T) * x_scale * scale        both interleaved (packing.py)

Any other is written out in x's dtype first, for some outputs at a time, so that what is written
stays small.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.packing import first_input, input_of, numbers

_BAND = 8192
"""Outputs that are written out at a time."""
_LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)
"""In float8 e4m3."""
_LEAST = (8, 9)
"""Compute capability from which on tensor cores multiply float8."""


@triton.jit
def _expand(
    words, scale, y, inputs, words_row,
    WORDS: tl.constexpr, FLOAT8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: a piece of an output's weights."""
    output = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    exists = at < inputs // 2
    step = tl.load(scale + output)
    pairs = tl.load(words + output * words_row + at, exists, 0)
    target = y + output * inputs + first_input(at)
    lower = numbers(pairs, False, FLOAT8, INTERPRETED).to(tl.float32) * step
    tl.store(target, lower.to(y.dtype.element_ty), exists)
    upper = numbers(pairs, True, FLOAT8, INTERPRETED).to(tl.float32) * step
    tl.store(target + 16, upper.to(y.dtype.element_ty), exists)


@triton.jit
def _round_rows(x, y, scale, inputs, x_row, INPUTS: tl.constexpr):  # fmt: skip
    """One program: a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, INPUTS)
    exact = tl.load(x + row * x_row + input_of(at), at < inputs, 0.0).to(tl.float32)
    step = tl.max(tl.abs(exact), 0) / _LARGEST
    step = tl.where(step > 0, step, 1.0)
    tl.store(scale + row, step)
    tl.store(y + row * inputs + at, (exact / step).to(y.dtype.element_ty), at < inputs)


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
    """Return the weight [outputs, inputs] times its scales [outputs], in order and wider."""
    outputs, inputs = weight.shape
    y = torch.empty(outputs, inputs, dtype=dtype, device=weight.device)
    words = weight.view(torch.int16)
    _expand[(outputs, triton.cdiv(inputs, 4096))](
        words, scale, y, inputs, words.stride(0),
        2048, weight.dtype == torch.float8_e4m3fn, y.device.type == "cpu",
    )  # fmt: skip
    return y


def in_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [rows, inputs] in float8, interleaved, and their scales [rows, 1] in float32."""
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
    if x.dtype != torch.bfloat16 or weight.dtype != torch.float8_e4m3fn:
        return False
    if x.shape[0] == 0 or x.stride(1) != 1 or any(size % 16 for size in weight.shape):
        return False
    return _has_float8(x.device)


@lru_cache
def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST
