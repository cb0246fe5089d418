"""silu(g) * u of more rows than memory's speed decides about, where g and u are the halves of one
product: the kernels whose tiles hold both halves of the same outputs.

    64 and 128 rows       one program holds all rows and a band of the weight
    from 513 rows on      tiles of 128 rows, one program a multiprocessor, which goes from tile to
                          tile
    else                  cuBLAS's product, and a kernel for the rest

Rows and weights come by the copy engine (tensor descriptors). cuBLAS is as fast or faster at the
product alone, but leaves both halves to be read again: a tenth of its time
(benchmarks/products.py, docs/performance.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from server.engine.early import launches_early, let_next_start, wait_for_previous
from server.engine.multiprocessor import (
    box_of,
    copies,
    multiprocessors,
    shared_memory,
    stages,
)

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
    x, weight, y, outputs, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: OUTPUTS outputs of all rows. x, weight and y are descriptors."""
    output = tl.program_id(0) * OUTPUTS
    gate = tl.zeros([ROWS, OUTPUTS], tl.float32)
    up = tl.zeros([ROWS, OUTPUTS], tl.float32)
    wait_for_previous(EARLY)
    for item in range(0, inputs, INPUTS):
        gate, up = _plus(gate, up, x.load([0, item]), weight, output, outputs, item)
    let_next_start(EARLY)
    y.store([0, output], _opened(gate, up).to(y.dtype))


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
            gate, up = _plus(gate, up, x.load([row, item]), weight, output, outputs, item)
        y.store([row, output], _opened(gate, up).to(y.dtype))


@triton.jit
def _plus(gate, up, part, weight, output, outputs, item):
    """Add the products of a part of the rows and the same inputs of both halves' outputs."""
    gate = tl.dot(part, weight.load([output, item]).T, gate, input_precision="ieee")
    up = tl.dot(part, weight.load([outputs + output, item]).T, up, input_precision="ieee")
    return gate, up


@triton.jit
def _opened(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


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
    if x.shape[0] > _MOST_OF_CUBLAS and takes_descriptors(x, weight):
        return gated_tiles(x, weight)
    return gate(functional.linear(x, weight))


def gated_of_some_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The same, of at most 128 rows that descriptors take; swept on an H100 and an H200.

    A program has little shared memory, so that a multiprocessor holds two: while one begins or
    ends, the other one reads.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2
    y = x.new_empty(rows, outputs)
    padded, tile_outputs = box_of(rows), 64
    tile_inputs, most_stages = (128, 2) if padded == 64 else (64, 3)
    early = launches_early(x.device)
    bytes_of_stage = tile_inputs * (2 * tile_outputs + padded) * x.dtype.itemsize
    _some_rows[(triton.cdiv(outputs, tile_outputs),)](
        TensorDescriptor.from_tensor(x, [padded, tile_inputs]),
        TensorDescriptor.from_tensor(weight, [tile_outputs, tile_inputs]),
        TensorDescriptor.from_tensor(y, [padded, tile_outputs]),
        outputs, inputs, padded, tile_outputs, tile_inputs, early, launch_pdl=early,
        num_warps=4, num_stages=stages(most_stages, bytes_of_stage, x.device),
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


def takes_descriptors(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels here can be used: on devices with a copy engine, where tiles
    fit."""
    fits = weight.shape[0] // 2 % _OUTPUTS == 0
    return fits and copies(x, weight) and shared_memory(x.device) >= _TILE_BYTES
