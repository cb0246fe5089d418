"""Triton kernels that write and read pages through block tables, with no gather copies.

    write    keys and values of the step's rows into their slots
    decode   sequences with one row, whose key and value it may write as well: split over the
             sequence, so that few sequences fill the device too (Flash-Decoding, Dao et al. 2023),
             then a reduction over the splits

Sequences with more rows are for chunks.py. Rotary embeddings, sliding windows and soft-capping are
parts of the kernels. A page may hold any number of tokens. Pages in eight bits (eight_bits.py) are
converted to the queries' dtype as they are read, and no query sees a key or value that was not
rounded to them. Lengths, tables and the list of tiles are read on the device, so a captured CUDA
graph stays valid for every step of its shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.attention.eight_bits import E4M3, LARGEST
from server.engine.early import launches_early, let_next_start, wait_for_previous

LOG2E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(LARGEST)
UNBOUNDED = 1 << 30
"""A window that sees everything."""


@triton.jit
def _as_stored(x, pages):
    """Round to what pages hold: E4M3 saturates."""
    if pages.dtype.element_ty.is_fp8():
        x = tl.minimum(tl.maximum(x.to(tl.float32), -_LARGEST), _LARGEST)
    return x.to(pages.dtype.element_ty)


@triton.jit
def rotated(at, cos, sin, dim, mask, DIM: tl.constexpr, ROTATES: tl.constexpr):
    """Load the numbers `dim` of a head, which are at `at`, and where that ROTATES them, turn them
    by the angles of a row, whose first cosine is at `cos`: number i with number i + DIM / 2."""
    x = tl.load(at, mask, 0.0)
    if ROTATES:
        is_first = dim < DIM // 2
        other = tl.load(at + tl.where(is_first, DIM // 2, -(DIM // 2)), mask, 0.0).to(tl.float32)
        c = tl.load(cos + dim, mask, 0.0).to(tl.float32)
        s = tl.load(sin + dim, mask, 0.0).to(tl.float32)
        x = (x.to(tl.float32) * c + tl.where(is_first, -other, other) * s).to(x.dtype)
    return x


@triton.jit
def _write(
    key, value, cos, sin, keys, values, slots, seen_key, seen_value,
    key_row, value_row, angle_row, page_stride, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, key_head, value_head,
    ROTATES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """One program: one row. What pages hold of it goes to seen_key and seen_value too, both
    [rows, heads, dim], where it is not what the row has: a key that it ROTATES, both where that
    ROUNDS them."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    column = tl.arange(0, WIDTH)
    head, place = column // DIM, column % DIM
    inside = column < HEADS * DIM
    target = (slot // TOKENS).to(tl.int64) * page_stride + (slot % TOKENS) * (HEADS * DIM) + column
    source = key + row * key_row + head * key_head + place
    k = rotated(source, cos + row * angle_row, sin + row * angle_row, place, inside, DIM, ROTATES)
    k = _as_stored(k, keys)
    tl.store(keys + target, k, mask=inside)
    source = row * value_row + head * value_head + place
    v = _as_stored(tl.load(value + source, mask=inside), values)
    tl.store(values + target, v, mask=inside)
    seen = row * (HEADS * DIM) + column
    if ROTATES or ROUNDS:
        tl.store(seen_key + seen, k.to(seen_key.dtype.element_ty), mask=inside)
    if ROUNDS:
        tl.store(seen_value + seen, v.to(seen_value.dtype.element_ty), mask=inside)


@triton.jit
def capped(scores, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        scaled = scores / softcap
        # tanh by exponentials; the argument is clipped where tanh is 1 in float32
        scaled = tl.minimum(tl.maximum(scaled, -15.0), 15.0)
        power = tl.exp(2 * scaled)
        scores = softcap * (power - 1) / (power + 1)
    return scores


@triton.jit
def _decode(
    query, key, value, cos, sin, keys, values, pages, table_starts, rows, slots, lengths,
    partial, weights, out, query_row, query_head, key_row, key_head, value_row, value_head,
    angle_row, out_row, page_stride,
    scaling, softcap, window,
    TOKENS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    CAPPED: tl.constexpr, ROTATES: tl.constexpr, WRITES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one sequence, one kv head, one split of its tokens.

    Where it WRITES, the split with the last token takes that one's key and value from the step's
    rows, and puts them into their page.
    """
    # Neighbours in time read what lies side by side: all heads of a token.
    kv_head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    row = tl.load(rows + sequence)
    table = pages + tl.load(table_starts + sequence)
    wait_for_previous(EARLY)
    if row < 0:
        return
    first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK
    start = first + split * share
    end = tl.minimum(start + share, length)

    member = tl.arange(0, PADDED)
    dim = tl.arange(0, DIM_PADDED)
    head = kv_head * GROUP + member
    mask = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    at = query + row * query_row + head[:, None] * query_head + dim[None, :]
    cos += row * angle_row
    sin += row * angle_row
    q = rotated(at, cos, sin, dim[None, :], mask, DIM, ROTATES)

    highest = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, DIM_PADDED], tl.float32)
    written = length - 1 if WRITES else length
    stop = tl.minimum(end, written)
    for block in range(start, stop, BLOCK):
        token = block + tl.arange(0, BLOCK)
        seen = token < stop
        page = tl.load(table + token // TOKENS, seen, 0).to(tl.int64)
        place = page * page_stride + (token % TOKENS) * (KV_HEADS * DIM) + kv_head * DIM
        inside = seen[:, None] & (dim < DIM)[None, :]
        k = tl.load(keys + place[:, None] + dim[None, :], inside, 0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = capped(scores, softcap, CAPPED)
        scores = tl.where(seen[None, :], scores, float("-inf")) * LOG2E
        risen = tl.maximum(highest, tl.max(scores, 1))
        fade = tl.exp2(highest - risen)
        p = tl.exp2(scores - risen[:, None])
        v = tl.load(values + place[:, None] + dim[None, :], inside, 0.0).to(q.dtype)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        highest = risen

    let_next_start(EARLY)
    if WRITES:
        if (start < length) & (end == length):
            own = key + row * key_row + kv_head * key_head + dim
            k = rotated(own, cos, sin, dim, dim < DIM, DIM, ROTATES)
            v = tl.load(value + row * value_row + kv_head * value_head + dim, dim < DIM, 0.0)
            k = _as_stored(k, keys)
            v = _as_stored(v, values)
            slot = tl.load(slots + row)
            place = (slot // TOKENS).to(tl.int64) * page_stride
            place += (slot % TOKENS) * (KV_HEADS * DIM) + kv_head * DIM
            tl.store(keys + place + dim, k, dim < DIM)
            tl.store(values + place + dim, v, dim < DIM)
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scaling
            score = capped(score, softcap, CAPPED) * LOG2E
            risen = tl.maximum(highest, score)
            fade = tl.exp2(highest - risen)
            p = tl.exp2(score - risen)
            acc = acc * fade[:, None] + p[:, None] * v.to(tl.float32)[None, :]
            total = total * fade + p
            highest = risen

    safe = tl.where(total > 0, total, 1.0)
    joined = acc / safe[:, None]
    if SPLITS == 1:
        target = out + row * out_row + head[:, None] * DIM + dim[None, :]
        tl.store(target, joined.to(out.dtype.element_ty), mask)
    else:
        slot = (sequence * KV_HEADS * GROUP + head) * SPLITS + split
        tl.store(partial + slot[:, None] * DIM + dim[None, :], joined, mask)
        weight = tl.where(total > 0, highest + tl.log2(safe), float("-inf"))
        tl.store(weights + slot, weight, member < GROUP)


@triton.jit
def _reduce(
    partial, weights, rows, out, out_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: the splits of one sequence and head, weighted by their share of the softmax."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + sequence)
    wait_for_previous(EARLY)
    if row < 0:
        return
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM_PADDED)
    slot = (sequence * HEADS + head) * SPLITS + split
    weight = tl.load(weights + slot)
    most = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(most == float("-inf"), 0.0, most))  # padding has no tokens
    parts = tl.load(partial + slot[:, None] * DIM + dim[None, :], (dim < DIM)[None, :], 0.0)
    let_next_start(EARLY)
    whole = tl.sum(weight, 0)
    joined = tl.sum(parts * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    target = out + row * out_row + head * DIM + dim
    tl.store(target, joined.to(out.dtype.element_ty), dim < DIM)


class Angles(NamedTuple):
    """What a row's queries and keys are rotated by (RoPE, Su et al., arXiv 2104.09864)."""

    cos: Tensor
    """[rows, dim], the second half of a row equal to the first."""
    sin: Tensor
    """Like cos."""


def write_pages(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    angles: Angles | None = None,
) -> tuple[Tensor, Tensor]:
    """Put key and value [rows, kv_heads, dim] into a layer's pages at `slots` [rows].

    keys and values are views [pages, tokens, kv_heads, dim] of the pool; keys are rotated by
    `angles` first. Returns key and value as pages hold them: themselves, or copies, rotated or
    rounded to eight bits. Rows with slot -1, padding, are left out.
    """
    rows, heads, dim = key.shape
    rounds = keys.dtype == E4M3
    seen_key = key if angles is None and not rounds else key.new_empty(rows, heads, dim)
    seen_value = value.new_empty(rows, heads, dim) if rounds else value
    cos, sin = (key, key) if angles is None else angles
    _write[(rows,)](
        key, value, cos, sin, keys, values, slots, seen_key, seen_value,
        key.stride(0), value.stride(0), cos.stride(0), keys.stride(0), keys.shape[1],
        heads, dim, triton.next_power_of_2(heads * dim), key.stride(1), value.stride(1),
        angles is not None, rounds, num_warps=4,
    )  # fmt: skip
    return seen_key, seen_value


@dataclass(frozen=True, slots=True)
class DecodeTiling:
    """How `decode` goes over a sequence."""

    block: int
    """Tokens at once."""
    stages: int
    resident: int
    """Programs that a multiprocessor runs side by side."""


def decode_tiling(heads: int, kv_heads: int, dim: int) -> DecodeTiling:
    """Return what benchmarks/attention.py found best: long blocks, if a multiprocessor has room for
    them; where heads share keys their queries take more of it."""
    if dim > 128:
        return DecodeTiling(64, 3, 2)
    return DecodeTiling(128, 2, 3 if heads == kv_heads else 2)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    table_starts: Tensor,
    rows: Tensor,
    slots: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    writes: bool,
    scaling: float,
    window: int | None,
    softcap: float,
    splits: int,
    angles: Angles | None = None,
) -> None:
    """Attend one row of each sequence over its pages, and write its key and value there first if
    `writes`, instead of `write_pages`.

    query and out are [rows, heads, dim], key and value [rows, kv_heads, dim]; queries, and keys
    that it writes, are rotated by `angles` first. pages holds the
    block tables, that of each sequence from table_starts [sequences] on; rows and lengths are
    [sequences], slots [rows]; all int32. A sequence of length 0 attends nothing, and one of row -1
    is left out: both are padding. softcap 0 means none.
    """
    sequences, heads, dim = len(rows), query.shape[1], query.shape[2]
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    partial = torch.empty(sequences, heads, splits, dim, dtype=torch.float32, device=query.device)
    weights = torch.empty(sequences, heads, splits, dtype=torch.float32, device=query.device)
    padded_dim = max(16, triton.next_power_of_2(dim))
    tiling = decode_tiling(heads, kv_heads, dim)
    cos, sin = (query, query) if angles is None else angles
    early = launches_early(query.device)
    _decode[(kv_heads, sequences, splits)](
        query, key, value, cos, sin, keys, values, pages, table_starts, rows, slots, lengths,
        partial, weights, out,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), cos.stride(0), out.stride(0), keys.stride(0),
        scaling, softcap, UNBOUNDED if window is None else window,
        keys.shape[1], kv_heads, group, max(16, triton.next_power_of_2(group)),
        dim, padded_dim, tiling.block, splits, softcap > 0, angles is not None, writes, early,
        num_warps=4, num_stages=tiling.stages, launch_pdl=early,
    )  # fmt: skip
    if splits > 1:
        # Small programs, which find room while the last ones of `_decode` run.
        _reduce[(sequences, heads)](
            partial, weights, rows, out, out.stride(0),
            heads, dim, padded_dim, splits, early, num_warps=1, launch_pdl=early,
        )  # fmt: skip
