"""silu(g) * u of more rows than memory's speed decides about, where g and u are the halves of one
product: the kernels whose tiles hold both halves of the same outputs.

    rows to 128           one program holds all rows and a band of the weight
    rows from 513         tiles of 128 rows, one program a multiprocessor, which goes from tile to
                          tile; rows and weights come by the copy engine (tensor descriptors)
    in between            cuBLAS's product, and a kernel for the rest

cuBLAS is as fast or faster at the product alone, but leaves both halves to be read again: a tenth
of its time (benchmarks/products.py, docs/performance.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from server.engine.early import launches_early, let_next_start, wait_for_previous
from server.engine.multiprocessor import (
    is_describable,
    multiprocessors,
    shared_memory,
    stages,
)

SOME_ROWS = range(33, 129)
"""Rows that `gated_of_some_rows` is for."""
_MOST_OF_CUBLAS = 512
"""Rows up to which cuBLAS's product, and a kernel for the rest, are faster than tiles."""

_TILE_ROWS, _TILE_OUTPUTS, _TILE_INPUTS, _STAGES = 128, 128, 64, 3
_TILE_BYTES = 2 * _TILE_INPUTS * (_TILE_ROWS + 2 * _TILE_OUTPUTS) * _STAGES
_OUTPUTS = 8
"""Outputs come in multiples of this: then rows of them are describable."""
_BAND, _BAND_OF_MANY = 16, 8
"""Tiles of rows that pass over the weight together: all of up to 2,048 rows, else fewer, so that
rows and weights of the tiles at work stay in the L2 cache."""


@triton.jit
def _some_rows(
    x, weight, y, rows, outputs, inputs, x_row, weight_row, y_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: OUTPUTS outputs of all rows, which are enough to stand on the left."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row, item = tl.arange(0, ROWS), tl.arange(0, INPUTS)
    exists, asked = output < outputs, row < rows
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    up = tl.zeros([ROWS, OUTPUTS], tl.float32)
    given = x + row[:, None] * x_row + item[None, :]
    band = weight + output[None, :].to(tl.int64) * weight_row + item[:, None]
    second = outputs.to(tl.int64) * weight_row
    wait_for_previous(EARLY)
    for _ in range(0, inputs, INPUTS):
        part = tl.load(given, asked[:, None], 0.0)
        tile = tl.load(band, exists[None, :], eviction_policy="evict_first")
        acc = tl.dot(part, tile, acc, input_precision="ieee")
        tile = tl.load(band + second, exists[None, :], eviction_policy="evict_first")
        up = tl.dot(part, tile, up, input_precision="ieee")
        given += INPUTS
        band += INPUTS
    let_next_start(EARLY)
    acc = acc / (1 + tl.exp(-acc)) * up
    target = y + row[:, None] * y_row + output[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), asked[:, None] & exists[None, :])


@triton.jit
def _tiles(
    x, weight, y, rows, outputs, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BAND: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One of PROGRAMS programs: every PROGRAMS-th tile. x, weight and y are descriptors.

    Tiles go down a band of BAND tiles of rows before they go on to the next outputs. A tile of the
    first half that reaches into the second one computes what is not stored.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    for tile in range(tl.program_id(0), down * across, PROGRAMS):
        band = tile // (BAND * across) * BAND
        size = tl.minimum(down - band, BAND)
        place = tile % (BAND * across)
        row, output = (band + place % size) * ROWS, place // size * OUTPUTS
        gate = tl.zeros([ROWS, OUTPUTS], tl.float32)
        up = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for item in range(0, inputs, INPUTS):
            part = x.load([row, item])
            gate = tl.dot(part, weight.load([output, item]).T, gate, input_precision="ieee")
            second = weight.load([outputs + output, item])
            up = tl.dot(part, second.T, up, input_precision="ieee")
        product = gate / (1 + tl.exp(-gate)) * up
        y.store([row, output], product.to(y.dtype))


@triton.jit
def _gate(x, y, width, WIDTH: tl.constexpr):  # fmt: skip
    """One program: a piece of a row. x is [rows, 2 * width]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(x + row * 2 * width + at, at < width, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, at < width, 0.0).to(tl.float32)
    opened = (gate / (1 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + at, (opened * up).to(y.dtype.element_ty), at < width)


def gated_of_many_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Return silu(g) * u, where g and u are the halves of x @ weight.T."""
    if x.shape[0] > _MOST_OF_CUBLAS and _has_tiles(x, weight):
        return gated_tiles(x, weight)
    return gate(functional.linear(x, weight))


def gated_of_some_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The same, of SOME_ROWS; swept on an H200. Inputs come in multiples of 64."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2
    y = x.new_empty(rows, outputs)
    padded = max(64, triton.next_power_of_2(rows))
    tile_outputs, tile_inputs = 128, 64
    early = launches_early(x.device)
    bytes_of_stage = tile_inputs * (2 * tile_outputs + padded) * x.dtype.itemsize
    _some_rows[(triton.cdiv(outputs, tile_outputs),)](
        x, weight, y, rows, outputs, inputs, x.stride(0), weight.stride(0), y.stride(0),
        padded, tile_outputs, tile_inputs, early, launch_pdl=early,
        num_warps=8, num_stages=stages(4, bytes_of_stage, x.device),
    )  # fmt: skip
    return y


def gated_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """The same, of any number of rows; swept on an H100. Rows are describable."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2
    y = x.new_empty(rows, outputs)
    down, across = triton.cdiv(rows, _TILE_ROWS), triton.cdiv(outputs, _TILE_OUTPUTS)
    programs = min(multiprocessors(x.device), down * across)
    _tiles[(programs,)](
        TensorDescriptor.from_tensor(x, [_TILE_ROWS, _TILE_INPUTS]),
        TensorDescriptor.from_tensor(weight, [_TILE_OUTPUTS, _TILE_INPUTS]),
        TensorDescriptor.from_tensor(y, [_TILE_ROWS, _TILE_OUTPUTS]),
        rows, outputs, inputs, _TILE_ROWS, _TILE_OUTPUTS, _TILE_INPUTS,
        _BAND if down <= _BAND else _BAND_OF_MANY, programs,
        num_warps=8, num_stages=_STAGES,
    )  # fmt: skip
    return y


def gate(both: Tensor) -> Tensor:
    """Return silu(g) * u, where both is [rows, g and u side by side]."""
    rows, width = both.shape[0], both.shape[1] // 2
    y = both.new_empty(rows, width)
    _gate[(rows, triton.cdiv(width, 2048))](both, y, width, 2048)
    return y


def _has_tiles(x: Tensor, weight: Tensor) -> bool:
    """Return whether tiles are the better choice: on devices with a copy engine, where they fit."""
    if not launches_early(x.device) or shared_memory(x.device) < _TILE_BYTES:
        return False
    fits = x.itemsize == 2 and weight.shape[0] // 2 % _OUTPUTS == 0
    return fits and is_describable(x) and is_describable(weight)
