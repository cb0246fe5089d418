"""Matrix products of few rows, at the speed of memory.

A decode step multiplies a handful of rows by every weight once, so its time is that of reading the
weights. cuBLAS reaches 65 to 90 % of a copy's bandwidth there; the kernel here, which gives each
program a band of the weight and streams it through, comes closer (docs/performance.md). What
follows a product is cheap beside it and a kernel launch is not, so it takes part::

    y = x @ weight.T + added              linear
    y = silu(x @ gate.T) * (x @ up.T)     gated, of the merged weight [gate; up]

(A norm before a product does not: every program would repeat it, which was slower than a kernel
of its own.) A weight in eight bits (eight_bits.py) comes with one scale an output: the kernel reads
its bytes, turns them into wider numbers in registers (packing.py), and scales the sums.

Products of more rows go to cuBLAS (many_rows.py, from eight bits), gated ones to gated_rows.py,
some with long inputs to shared_inputs.py; which one runs is decided at each call. Compiled layers
call these as opaque operators (compiling.py puts them in the place of torch's).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from server.engine import many_rows, shared_inputs
from server.engine.early import launches_early, let_next_start, wait_for_previous
from server.engine.gated_rows import (
    gate,
    gated_of_many_rows,
    gated_of_some_rows,
    takes_descriptors,
)
from server.engine.multiprocessor import BOXES, stages
from server.engine.operators import in_place, operator
from server.engine.packing import first_input, numbers

_MOST_ROWS, _MOST_ROWS_OF_NARROW = 64, 32
"""Beyond these cuBLAS is as fast."""
_MOST_ROWS_OF_EIGHT_BITS = 128
"""Beyond these, what cuBLAS needs first (a wider weight, or rows in eight bits) is worth it."""
_WIDE = 8192
"""Outputs."""
_FEWEST_OUTPUTS = 2048
"""Narrower weights give too few programs to fill a device."""


class Tiling(NamedTuple):
    """How a program walks along its band of a weight."""

    outputs: int
    """In the band, of each half where there are two."""
    inputs: int
    """In a step."""
    stages: int
    """Steps whose tiles are on their way from memory at once, if there is room."""
    warps: int


def tiling(outputs: int, inputs: int, rows: int, itemsize: int, gated: bool) -> Tiling:
    """Return what suits a weight [outputs, inputs], or two such halves, and so many rows.

    Narrow weights have fewer programs than there are multiprocessors, so each has one to itself;
    gated ones take two tiles a step. A tile of eight bits holds twice the inputs in as many bytes,
    until those of x are the larger part.
    """
    stages = 3 if gated else 4 if outputs >= _WIDE else 8
    if itemsize == 1:
        return Tiling(64, math.gcd(inputs, 256 if rows <= 32 else 128), stages, 4)
    return Tiling(64, 128, stages, 4)


@triton.jit
def _few_rows(
    x, weight, scale, added, y, rows, outputs, inputs, x_row, weight_row, added_row, y_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    SCALED: tl.constexpr, FLOAT8: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr,
    INTERPRETED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: OUTPUTS outputs of all rows. A scaled weight is in words of two numbers."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    exists, asked = output < outputs, row < rows
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    band = weight + output[:, None].to(tl.int64) * weight_row
    given = x + row[None, :] * x_row
    item = tl.arange(0, INPUTS // 2 if SCALED else INPUTS)
    wait_for_previous(EARLY)
    for start in range(0, inputs, INPUTS):
        at = (start // 2 if SCALED else start) + item
        part = tl.load(band + at[None, :], exists[:, None], eviction_policy="evict_first")
        first = start + (first_input(item) if SCALED else item)
        low = tl.load(given + first[:, None], asked[None, :], 0.0)
        high = low
        if SCALED:
            high = tl.load(given + first[:, None] + 16, asked[None, :], 0.0)
        acc = _plus(acc, part, low, high, SCALED, FLOAT8, INTERPRETED)
        if GATED:
            second = band + outputs.to(tl.int64) * weight_row + at[None, :]
            part = tl.load(second, exists[:, None], eviction_policy="evict_first")
            up = _plus(up, part, low, high, SCALED, FLOAT8, INTERPRETED)
    let_next_start(EARLY)
    if SCALED:
        acc *= tl.load(scale + output, exists, 0.0)[:, None]
        if GATED:
            up *= tl.load(scale + outputs + output, exists, 0.0)[:, None]
    if GATED:
        acc = acc / (1 + tl.exp(-acc)) * up
    place = exists[:, None] & asked[None, :]
    if ADDED:
        more = added + row[None, :] * added_row + output[:, None]
        acc += tl.load(more, place, 0.0).to(tl.float32)
    target = y + row[None, :] * y_row + output[:, None]
    tl.store(target, acc.to(y.dtype.element_ty), place)


@triton.jit
def _plus(
    acc, part, low, high,
    SCALED: tl.constexpr, FLOAT8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add the product of a tile of the weight and what it meets of x."""
    # The weight stands on the left: it has the many rows that tensor cores want.
    if SCALED:
        lower = numbers(part, False, FLOAT8, INTERPRETED).to(low.dtype)
        acc += tl.dot(lower, low, input_precision="ieee")
        upper = numbers(part, True, FLOAT8, INTERPRETED).to(low.dtype)
        acc += tl.dot(upper, high, input_precision="ieee")
    else:
        acc += tl.dot(part, low, input_precision="ieee")
    return acc


def _linear_shape(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operator(_linear_shape)
def linear(x: Tensor, weight: Tensor, added: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Return x @ (weight * scale).T + added.

    x is [rows, inputs], weight [outputs, inputs], added None, [outputs] or [rows, outputs]. With
    a weight of eight bits, interleaved as packing.py says, goes its scale, [outputs] in float32.
    """
    if _suits(x, weight):
        return _multiply(x, weight, added, scale, gated=False)
    if scale is not None:
        return many_rows.scaled_linear(x, weight, added, scale)
    if shared_inputs.takes(x, weight):
        return shared_inputs.product(x, weight, added)
    if added is None or added.dim() == 1:
        return functional.linear(x, weight, added)
    return torch.addmm(added, x, weight.t())


@in_place("total")
def add_product(x: Tensor, weight: Tensor, total: Tensor) -> None:
    """Add x @ weight.T to total [rows, outputs], which cuBLAS copies where it is `linear`'s."""
    if _suits(x, weight):
        _multiply(x, weight, total, None, gated=False, into=total)
    elif shared_inputs.takes(x, weight):
        shared_inputs.product(x, weight, total, into=total)
    elif len(x) == 1:  # whose stride may be none, which cuBLAS does not take
        total.add_(functional.linear(x, weight))
    else:
        total.addmm_(x, weight.t())


def _gated_shape(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


@operator(_gated_shape)
def gated(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return silu(g) * u, where g and u are the halves of x @ (weight * scale).T.

    x is [rows, inputs], weight [2 * outputs, inputs], scale as in `linear`.
    """
    whole = scale is None and x.shape[0] in BOXES
    if whole and _is_laid_out(x, weight) and takes_descriptors(x, weight):
        return gated_of_some_rows(x, weight)
    if _suits(x, weight):
        return _multiply(x, weight, None, scale, gated=True)
    if scale is not None:
        return gate(many_rows.scaled_linear(x, weight, None, scale))
    return gated_of_many_rows(x, weight)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernel here is the better choice than cuBLAS.

    Measured by benchmarks/products.py for weights of 4096 to 128256 outputs.
    """
    rows, outputs = x.shape[0], weight.shape[0]
    if not _is_laid_out(x, weight):
        return False
    if weight.dtype.itemsize == 1:
        return rows <= _MOST_ROWS_OF_EIGHT_BITS
    return rows <= (_MOST_ROWS if outputs >= _WIDE else _MOST_ROWS_OF_NARROW)


def _is_laid_out(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels here can walk along both."""
    if x.dtype.itemsize != 2 or x.stride(1) != 1 or weight.stride(1) != 1:
        return False
    outputs, inputs = weight.shape
    return weight.dtype.itemsize == 1 or (inputs % 256 == 0 and outputs >= _FEWEST_OUTPUTS)


def _multiply(
    x: Tensor,
    weight: Tensor,
    added: Tensor | None,
    scale: Tensor | None,
    *,
    gated: bool,
    into: Tensor | None = None,
) -> Tensor:
    """Return the product in a tensor of its own or `into` one, which may be what is added."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    y = x.new_empty(rows, outputs) if into is None else into
    more = y if added is None else added.expand(rows, outputs)
    padded = max(16, triton.next_power_of_2(rows))
    tile = tiling(outputs, inputs, padded, weight.dtype.itemsize, gated)
    early = launches_early(x.device)
    at_once = (2 * tile.outputs if gated else tile.outputs) * weight.dtype.itemsize
    bytes_of_stage = tile.inputs * (at_once + padded * x.dtype.itemsize)
    items = weight if scale is None else weight.view(torch.int16)
    _few_rows[(triton.cdiv(outputs, tile.outputs),)](
        x, items, y if scale is None else scale, more, y, rows, outputs, inputs,
        x.stride(0), items.stride(0), more.stride(0), y.stride(0),
        padded, tile.outputs, tile.inputs,
        scale is not None, weight.dtype == torch.float8_e4m3fn, added is not None, gated,
        x.device.type == "cpu", early, launch_pdl=early,
        num_warps=tile.warps,
        num_stages=stages(tile.stages, bytes_of_stage, x.device),
    )  # fmt: skip
    return y
