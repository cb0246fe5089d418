"""How numbers of eight bits lie in memory, and how kernels turn them into wider ones.

Tensor cores multiply numbers of 16 bits, so a tile of bytes is read as words of 16 bits, which then
hold two numbers each, and becomes two tiles of the same form without a byte moving between threads.
So that each of them has consecutive inputs, those of every 32 are interleaved in memory::

    bytes     0 16 1 17 2 18 ... 15 31      the lower bytes of 16 words hold 16 inputs,
    words     0    1    2    ... 15         the upper ones the next 16

On a device, two words are turned into bfloat16 at once. Left to the compiler, bytes come from
shared memory in twos, are sorted and converted: 914 instructions for a tile of 64 x 256 integers
instead of 371 (Triton 3.9, counted in the machine code), about as many as an H200 can issue while
the tile comes from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
"""Inputs that are interleaved."""


def interleave(numbers: Tensor) -> Tensor:
    """Return [outputs, inputs] with every 32 inputs as they lie in memory."""
    halves = numbers.view(len(numbers), -1, 2, BLOCK // 2)
    return halves.transpose(2, 3).reshape(numbers.shape)


def in_order(numbers: Tensor) -> Tensor:
    """Return [outputs, inputs] in the order of the inputs."""
    pairs = numbers.view(len(numbers), -1, BLOCK // 2, 2)
    return pairs.transpose(2, 3).reshape(numbers.shape)


@triton.jit
def first_input(word):
    """Return the input that a word's lower byte holds; the upper one's is 16 further."""
    return word // 16 * 32 + word % 16


@triton.jit
def input_of(byte):
    """Return the input that a byte holds."""
    return byte // 32 * 32 + byte % 2 * 16 + byte % 32 // 2


@triton.jit
def numbers(words, UPPER: tl.constexpr, FLOAT8: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the numbers in the lower or upper bytes of words: int8 or float8 (e4m3).

    In bfloat16, which holds each of them exactly; interpreted, as they are.
    """
    if INTERPRETED:
        part = (words >> 8 if UPPER else words).to(tl.int8)
        return part.to(tl.float8e4nv, bitcast=True) if FLOAT8 else part
    elif FLOAT8:
        return _from_float8(words, UPPER)
    else:
        return _from_int8(words, UPPER)


@triton.jit
def _from_int8(words, UPPER: tl.constexpr):
    """A byte is its lower seven bits, less 128 if the eighth is set. In the mantissa of 128.0 the
    seven bits make 128 to 255; the eighth turns -128.0 into -256.0; the number is their sum."""
    if UPPER:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 w, a, b, one;
            shr.u32 w, $1, 8;
            lop3.b32 a, w, 0x007f007f, 0x43004300, 0xEA;
            lop3.b32 b, w, 0x00800080, 0xC300C300, 0xEA;
            mov.b32 one, 0x3F803F80;
            fma.rn.bf16x2 $0, a, one, b;
            }""",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, one;
            lop3.b32 a, $1, 0x007f007f, 0x43004300, 0xEA;
            lop3.b32 b, $1, 0x00800080, 0xC300C300, 0xEA;
            mov.b32 one, 0x3F803F80;
            fma.rn.bf16x2 $0, a, one, b;
            }""",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _from_float8(words, UPPER: tl.constexpr):
    """Sign, exponent and mantissa go where bfloat16 has them, the mantissa first in its place. What
    they make there is smaller by the exponents' biases, 2 ** (127 - 7); so for subnormals, too."""
    if UPPER:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 v, sign, times, zero;
            and.b32 sign, $1, 0x80008000;
            shr.u32 v, $1, 4;
            lop3.b32 v, v, 0x07f007f0, sign, 0xEA;
            mov.b32 times, 0x7B807B80;
            mov.b32 zero, 0x80008000;
            fma.rn.bf16x2 $0, v, times, zero;
            }""",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 v, sign, times, zero;
            shl.b32 sign, $1, 8;
            and.b32 sign, sign, 0x80008000;
            shl.b32 v, $1, 4;
            lop3.b32 v, v, 0x07f007f0, sign, 0xEA;
            mov.b32 times, 0x7B807B80;
            mov.b32 zero, 0x80008000;
            fma.rn.bf16x2 $0, v, times, zero;
            }""",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
