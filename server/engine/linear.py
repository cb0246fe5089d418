"""Matrix products of few rows, at the speed of memory.

A decode step multiplies a handful of rows by every weight once, so its time is that of reading the
weights. cuBLAS reaches 65 to 90 % of a copy's bandwidth there; the kernel here, which gives each
program a band of the weight and streams it through, comes closer (docs/performance.md). What
follows a product is cheap beside it and a kernel launch is not, so it takes part::

    y = x @ weight.T + added              linear
    y = silu(x @ gate.T) * (x @ up.T)     gated, of the merged weight [gate; up]

(A norm before a product does not: every program would repeat it, which was slower than a kernel
of its own.) Products of many rows go to cuBLAS; which one runs is decided at each call. Compiled
layers call these as opaque operators (compiling.py puts them in the place of torch's).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

_MOST_ROWS, _MOST_ROWS_OF_NARROW = 64, 32
"""Beyond these cuBLAS is as fast."""
_WIDE = 8192
"""Outputs."""
_TILE = (64, 128)
"""Outputs and inputs of a program's step, of each half where there are two."""
_STAGES, _STAGES_OF_NARROW, _GATED_STAGES = 4, 8, 3
"""Tiles on their way from memory at once. Narrow weights have fewer programs than there are
multiprocessors, so each has one to itself; gated ones take two tiles a step."""
_FEWEST_OUTPUTS = 2048
"""Narrower weights give too few programs to fill a device."""


@triton.jit
def _few_rows(
    x, weight, added, y, rows, outputs, inputs, x_row, weight_row, added_row, y_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    ADDED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program: OUTPUTS outputs of all rows."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    exists, asked = output < outputs, row < rows
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    band = weight + output[:, None].to(tl.int64) * weight_row
    for start in range(0, inputs, INPUTS):
        at = start + tl.arange(0, INPUTS)
        # The weight stands on the left: it has the many rows that tensor cores want.
        part = tl.load(band + at[None, :], exists[:, None], 0.0, eviction_policy="evict_first")
        given = tl.load(x + row[None, :] * x_row + at[:, None], asked[None, :], 0.0)
        acc += tl.dot(part, given, input_precision="ieee")
        if GATED:
            second = band + outputs.to(tl.int64) * weight_row + at[None, :]
            part = tl.load(second, exists[:, None], 0.0, eviction_policy="evict_first")
            up += tl.dot(part, given, input_precision="ieee")
    if GATED:
        acc = acc / (1 + tl.exp(-acc)) * up
    place = exists[:, None] & asked[None, :]
    if ADDED:
        more = added + row[None, :] * added_row + output[:, None]
        acc += tl.load(more, place, 0.0).to(tl.float32)
    target = y + row[None, :] * y_row + output[:, None]
    tl.store(target, acc.to(y.dtype.element_ty), place)


@triton.jit
def _gate(x, y, width, WIDTH: tl.constexpr):  # fmt: skip
    """One program: a piece of a row. x is [rows, 2 * width]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(x + row * 2 * width + at, at < width, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, at < width, 0.0).to(tl.float32)
    opened = (gate / (1 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + at, (opened * up).to(y.dtype.element_ty), at < width)


@torch.library.custom_op("attndrop::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
    """Return x @ weight.T + added.

    x is [rows, inputs], weight [outputs, inputs], added None, [outputs] or [rows, outputs].
    """
    if _suits(x, weight):
        return _multiply(x, weight, added, gated=False)
    if added is None or added.dim() == 1:
        return functional.linear(x, weight, added)
    return torch.addmm(added, x, weight.t())


@linear.register_fake
def _linear_shape(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("attndrop::gated", mutates_args=())
def gated(x: Tensor, weight: Tensor) -> Tensor:
    """Return silu(g) * u, where g and u are the halves of x @ weight.T.

    x is [rows, inputs], weight [2 * outputs, inputs].
    """
    if _suits(x, weight):
        return _multiply(x, weight, None, gated=True)
    return gate(functional.linear(x, weight))


@gated.register_fake
def _gated_shape(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


def gate(both: Tensor) -> Tensor:
    """Return silu(g) * u, where both is [rows, g and u side by side]."""
    rows, width = both.shape[0], both.shape[1] // 2
    y = torch.empty(rows, width, dtype=both.dtype, device=both.device)
    _gate[(rows, triton.cdiv(width, 2048))](both, y, width, 2048)
    return y


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernel here is the better choice than cuBLAS.

    Measured by benchmarks/products.py for weights of 4096 to 128256 outputs.
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    suits = x.dtype.itemsize == 2 and inputs % 256 == 0 and outputs >= _FEWEST_OUTPUTS
    if not suits or x.stride(1) != 1 or weight.stride(1) != 1:
        return False
    return rows <= (_MOST_ROWS if outputs >= _WIDE else _MOST_ROWS_OF_NARROW)


def _multiply(x: Tensor, weight: Tensor, added: Tensor | None, *, gated: bool) -> Tensor:
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    more = y if added is None else added.expand(rows, outputs)
    padded = max(16, triton.next_power_of_2(rows))
    _few_rows[(triton.cdiv(outputs, _TILE[0]),)](
        x, weight, more, y, rows, outputs, inputs,
        x.stride(0), weight.stride(0), more.stride(0), y.stride(0),
        padded, *_TILE, added is not None, gated,
        num_warps=4, num_stages=_stages(x.device, outputs, padded, x.dtype.itemsize, gated),
    )  # fmt: skip
    return y


def _stages(device: torch.device, outputs: int, rows: int, itemsize: int, gated: bool) -> int:
    """Return how many steps' tiles are on their way at once: as many as there is room for."""
    outputs_at_once = 2 * _TILE[0] if gated else _TILE[0]
    step_bytes = (outputs_at_once + rows) * _TILE[1] * itemsize
    wanted = _STAGES_OF_NARROW if outputs < _WIDE else _STAGES
    return max(2, min(_GATED_STAGES if gated else wanted, _shared_memory(device) // step_bytes))


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes that one program may take."""
    if device.type != "cuda":
        return 227 << 10  # the kernels are interpreted, as on an H100
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
