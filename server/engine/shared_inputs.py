"""Products of some rows by a weight of long inputs and few outputs, such as a down projection.

Bands of its outputs are too few for a device's multiprocessors, so programs share a band: each has
a part of the inputs, and a second kernel joins the parts, in float32, with what is added::

    [4096, 14336]    64 bands of 64 outputs  x  2 parts of 7,168 inputs  =  128 programs

Rows and weights come by the copy engine (tensor descriptors), 64 or 128 rows at once. cuBLAS is as
fast or faster where inputs are not that long (docs/performance.md).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from server.engine.early import launches_early, let_next_start, wait_for_previous
from server.engine.multiprocessor import BOXES, box_of, copies, multiprocessors, stages

_LONG = 3
"""Inputs are more than so many for each output."""
_SOME_PARTS = range(2, 5)
"""More would have more to join than to multiply."""
_OUTPUTS, _INPUTS, _STAGES = 64, 64, 7
_ALIGNED = 4
"""Outputs come in multiples of this: then rows of sums are describable."""
_WIDTH = 1024
"""Outputs that a program joins."""


@triton.jit
def _multiply(
    x, weight, sums, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: a band of outputs, and one of the parts of `inputs` inputs. x, weight and sums
    are descriptors, sums of [parts * ROWS, outputs]."""
    output, part = tl.program_id(0) * OUTPUTS, tl.program_id(1)
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    wait_for_previous(EARLY)
    for item in range(part * inputs, part * inputs + inputs, INPUTS):
        acc = tl.dot(x.load([0, item]), weight.load([output, item]).T, acc, input_precision="ieee")
    let_next_start(EARLY)
    sums.store([part * ROWS, output], acc)


@triton.jit
def _join(
    sums, added, y, outputs, added_row, y_row,
    PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ADDED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: a piece of a row, which may be read from where it is written."""
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists = output < outputs
    wait_for_previous(EARLY)
    total = tl.zeros([WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums + (part * ROWS + row) * outputs + output, exists, 0.0)
    if ADDED:
        total += tl.load(added + row * added_row + output, exists, 0.0).to(tl.float32)
    let_next_start(EARLY)
    tl.store(y + row * y_row + output, total.to(y.dtype.element_ty), exists)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether `product` is the best choice for x @ weight.T."""
    outputs, inputs = weight.shape
    fits = x.shape[0] in BOXES and inputs > _LONG * outputs and outputs % _ALIGNED == 0
    return fits and copies(x, weight) and _parts(outputs, x.device) in _SOME_PARTS


def product(x: Tensor, weight: Tensor, added: Tensor | None, into: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + added, in a tensor of its own or `into` one that may be what is added.

    x is [rows, inputs], at most 128 rows, weight [outputs, inputs], added None, [outputs] or
    [rows, outputs]. Descriptors take x and weight; outputs come in fours.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    y = x.new_empty(rows, outputs) if into is None else into
    more = y if added is None else added.expand(rows, outputs)
    parts = min(_parts(outputs, x.device), _SOME_PARTS[-1])
    each = triton.cdiv(triton.cdiv(inputs, parts), _INPUTS) * _INPUTS
    padded = box_of(rows)
    sums = torch.empty(parts * padded, outputs, dtype=torch.float32, device=x.device)
    early = launches_early(x.device)
    bytes_of_stage = _INPUTS * (padded + _OUTPUTS) * x.itemsize
    _multiply[(triton.cdiv(outputs, _OUTPUTS), parts)](
        TensorDescriptor.from_tensor(x, [padded, _INPUTS]),
        TensorDescriptor.from_tensor(weight, [_OUTPUTS, _INPUTS]),
        TensorDescriptor.from_tensor(sums, [padded, _OUTPUTS]),
        each, padded, _OUTPUTS, _INPUTS, early, launch_pdl=early,
        num_warps=4, num_stages=stages(_STAGES, bytes_of_stage, x.device),
    )  # fmt: skip
    _join[(rows, triton.cdiv(outputs, _WIDTH))](
        sums, more, y, outputs, more.stride(0), y.stride(0),
        parts, padded, _WIDTH, added is not None, early, launch_pdl=early,
    )  # fmt: skip
    return y


def _parts(outputs: int, device: torch.device) -> int:
    """Return into how many parts the inputs are cut for each multiprocessor to have a program."""
    return multiprocessors(device) // math.ceil(outputs / _OUTPUTS)
