"""Triton kernels that attend prompt chunks: what lies before a chunk comes from pages, its own keys
and values from the rows of the step.

    chunk    one tile of rows and one head: causal FlashAttention-2 (Dao, arXiv 2307.08691) over all
             that the rows see, or a part of it (tiles.py)
    join     the parts of a tile

Blocks of the chunk's own tokens that all rows of a tile see come by the copy engine (tensor
descriptors), which leaves the threads their registers. All others are loaded with a mask: a block
that ends in another sequence's rows must not let those in, not even multiplied by nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from server.engine.attention.kernels import LOG2E, UNBOUNDED, Angles, capped, rotated
from server.engine.attention.tiles import BLOCK
from server.engine.multiprocessor import is_describable

_JOINED_ROWS = 16
"""Rows of a tile that one program joins the parts of."""
_LEAST_BYTES = 16
"""Of a tile's row that the copy engine brings."""


@triton.jit
def _fold(
    acc, total, highest, q, keys, values, table, column, begin, end, limit, asks,
    key_row, value_row, page_stride, factor, scaling, softcap, window,
    TOKENS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Take the tokens from begin to end into a running softmax (online, as in FlashAttention).

    Where it is not MASKED, all rows see all of them; else those before `limit` that lie in a row's
    window and not behind it. `asks` numbers the rows like the tokens. Where they are DESCRIBED,
    keys and values are descriptors, `table` is the row of the first token and `column` the head's
    first.
    """
    dim = tl.arange(0, DIM_PADDED)
    for at in range(begin, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        exists = token < limit if MASKED else token >= 0
        inside = exists[:, None] & (dim < DIM)[None, :]
        if PAGED:
            page = tl.load(table + token // TOKENS, exists, 0).to(tl.int64) * page_stride
            key_at = page + (token % TOKENS) * key_row
            value_at = page + (token % TOKENS) * value_row
        else:
            key_at, value_at = token * key_row, token * value_row
        if DESCRIBED:
            k = keys.load([table + at, column])
        elif MASKED or DIM != DIM_PADDED:
            k = tl.load(keys + key_at[:, None] + dim[None, :], inside, 0.0)
        else:
            k = tl.load(keys + key_at[:, None] + dim[None, :])
        k = k.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAPPED:
            scores = capped(scores * scaling, softcap, CAPPED)
        if MASKED:
            behind = asks[:, None] - token[None, :]
            seen = (behind >= 0) & (behind < window) & exists[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1) * factor)
        fade = tl.exp2(highest - risen)
        p = tl.exp2(scores * factor - risen[:, None])
        if DESCRIBED:
            v = values.load([table + at, column])
        elif MASKED or DIM != DIM_PADDED:
            v = tl.load(values + value_at[:, None] + dim[None, :], inside, 0.0)
        else:
            v = tl.load(values + value_at[:, None] + dim[None, :])
        v = v.to(q.dtype)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        highest = risen
    return acc, total, highest


@triton.jit
def _chunk(
    query, key, value, key_tiles, value_tiles, cos, sin, keys, values, pages, table_starts, items,
    starts, lengths, partial, weights, out, query_row, query_head, key_row, key_head, value_row,
    value_head, angle_row, out_row, page_stride, scaling, softcap, window,
    TOKENS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, ROTATES: tl.constexpr, CUT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One program: one head of an item, ROWS rows of one sequence over the tokens they may see or,
    where tiles are CUT, a part of those: tokens before the chunk come from pages, those of the
    chunk from the step's rows, which lie together."""
    # Neighbours in time are heads of one item, which read the same tokens.
    head, kv_head = tl.program_id(0), tl.program_id(0) // GROUP
    item = items + tl.program_id(1) * 4
    sequence = tl.load(item)
    if sequence < 0:
        return
    first = tl.load(item + 1)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    table = pages + tl.load(table_starts + sequence)
    before = tl.load(lengths + sequence) - count
    local = first + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PADDED)
    valid = (local < count)[:, None] & (dim < DIM)[None, :]
    at_row = (start + local)[:, None]
    at = query + at_row * query_row + head * query_head + dim[None, :]
    angle = at_row * angle_row
    q = rotated(at, cos + angle, sin + angle, dim[None, :], valid, DIM, ROTATES)

    # Finite: rows that see nothing yet must not become nan.
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    factor = scaling * LOG2E
    if CAPPED:
        factor = LOG2E
    # Tokens from begin to stop, counted from the sequence's first one.
    begin, stop = 0, before + tl.minimum(first + ROWS, count)
    if WINDOWED:
        begin = tl.maximum(before + first - window + 1, 0) // BLOCK * BLOCK
    part, parts = 0, 1
    if CUT:
        part, parts = tl.load(item + 2), tl.load(item + 3)
        share = tl.cdiv(tl.cdiv(stop - begin, BLOCK), parts) * BLOCK
        begin += part * share
        stop = tl.minimum(stop, begin + share)
    paged_stop, own_begin = before, 0
    if CUT:
        paged_stop = tl.minimum(before, stop)
    if CUT or WINDOWED:
        own_begin = tl.maximum(begin - before, 0)
    own_stop = stop - before
    # In each half, whole blocks that all rows see come first, if nothing limits how far back.
    seen_by_all, own_by_all = begin, own_begin
    if not WINDOWED:
        seen_by_all += tl.maximum(paged_stop - begin, 0) // BLOCK * BLOCK
        own_by_all += tl.maximum(tl.minimum(first + 1, own_stop) - own_begin, 0) // BLOCK * BLOCK
    keys, values = keys + kv_head * DIM, values + kv_head * DIM
    key += start * key_row + kv_head * key_head
    value += start * value_row + kv_head * value_head
    width = KV_HEADS * DIM
    if not WINDOWED:
        acc, total, highest = _fold(
            acc, total, highest, q, keys, values, table, 0, begin, seen_by_all, paged_stop,
            before + local, width, width, page_stride, factor, scaling, softcap, window,
            TOKENS, DIM, DIM_PADDED, BLOCK, CAPPED, True, False, False,
        )  # fmt: skip
    acc, total, highest = _fold(
        acc, total, highest, q, keys, values, table, 0, seen_by_all, paged_stop, paged_stop,
        before + local, width, width, page_stride, factor, scaling, softcap, window,
        TOKENS, DIM, DIM_PADDED, BLOCK, CAPPED, True, True, False,
    )  # fmt: skip
    if DESCRIBED:
        acc, total, highest = _fold(
            acc, total, highest, q, key_tiles, value_tiles, start, kv_head * DIM, own_begin,
            own_by_all, own_stop, local, 0, 0, 0, factor, scaling, softcap, window,
            TOKENS, DIM, DIM_PADDED, BLOCK, CAPPED, False, False, True,
        )  # fmt: skip
    elif not WINDOWED:
        acc, total, highest = _fold(
            acc, total, highest, q, key, value, table, 0, own_begin, own_by_all, own_stop,
            local, key_row, value_row, page_stride, factor, scaling, softcap, window,
            TOKENS, DIM, DIM_PADDED, BLOCK, CAPPED, False, False, False,
        )  # fmt: skip
    acc, total, highest = _fold(
        acc, total, highest, q, key, value, table, 0, own_by_all, own_stop, own_stop,
        local, key_row, value_row, page_stride, factor, scaling, softcap, window,
        TOKENS, DIM, DIM_PADDED, BLOCK, CAPPED, False, True, False,
    )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    joined = acc / safe[:, None]
    if parts == 1:
        target = out + at_row * out_row + head * DIM + dim[None, :]
        tl.store(target, joined.to(out.dtype.element_ty), valid)
    else:
        slot = (tl.program_id(1) * KV_HEADS * GROUP + head) * ROWS + tl.arange(0, ROWS)
        tl.store(partial + slot[:, None] * DIM + dim[None, :], joined, valid)
        weight = tl.where(total > 0, highest + tl.log2(safe), float("-inf"))
        tl.store(weights + slot, weight, local < count)


@triton.jit
def _join(
    partial, weights, items, starts, out, out_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr,
    JOINED: tl.constexpr,
):  # fmt: skip
    """One program: JOINED rows of one head of a tile that was cut, its parts weighted by their
    share of the softmax. Only that of a tile's first part, which the others follow, does it."""
    head, number = tl.program_id(0), tl.program_id(1)
    item = items + number * 4
    sequence, part, parts = tl.load(item), tl.load(item + 2), tl.load(item + 3)
    if (sequence < 0) | (part > 0) | (parts == 1):
        return
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    place = tl.program_id(2) * JOINED + tl.arange(0, JOINED)
    local = tl.load(item + 1) + place
    dim = tl.arange(0, DIM_PADDED)
    exists = local < count
    valid = exists[:, None] & (dim < DIM)[None, :]
    most = tl.full([JOINED], -1e30, tl.float32)
    whole = tl.zeros([JOINED], tl.float32)
    acc = tl.zeros([JOINED, DIM_PADDED], tl.float32)
    for at in range(number, number + parts):
        slot = (at * HEADS + head) * ROWS + place
        weight = tl.load(weights + slot, exists, float("-inf"))
        result = tl.load(partial + slot[:, None] * DIM + dim[None, :], valid, 0.0)
        risen = tl.maximum(most, weight)
        fade, weight = tl.exp2(most - risen), tl.exp2(weight - risen)
        acc = acc * fade[:, None] + result * weight[:, None]
        whole = whole * fade + weight
        most = risen
    joined = acc / tl.where(whole > 0, whole, 1.0)[:, None]
    target = out + (start + local)[:, None] * out_row + head * DIM + dim[None, :]
    tl.store(target, joined.to(out.dtype.element_ty), valid)


def attend_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    table_starts: Tensor,
    items: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    tile_rows: int,
    parts: int,
    scaling: float,
    window: int | None,
    softcap: float,
    angles: Angles | None = None,
) -> None:
    """Attend the rows of chunks by `items` [items, 4] of tiles.py, made for tiles of `tile_rows`
    rows; only the first `parts` of them may be parts of tiles. Sequence -1 is padding.

    query and out are [rows, heads, dim], key and value [rows, kv_heads, dim], the step's own, as
    pages hold them; queries are rotated by `angles` first. What
    lies before a chunk is read from pages. starts [all sequences + 1], lengths and table_starts
    [all sequences] are all int32 on the device.
    """
    heads, dim = query.shape[1], query.shape[2]
    kv_heads = keys.shape[2]
    padded_dim = max(16, triton.next_power_of_2(dim))
    cos, sin = (query, query) if angles is None else angles
    partial = torch.empty(parts, heads, tile_rows, dim, dtype=torch.float32, device=query.device)
    weights = torch.empty(parts, heads, tile_rows, dtype=torch.float32, device=query.device)
    described = window is None and padded_dim == dim and _suits(key) and _suits(value)
    tiles = [_tiles(x) if described else x for x in (key, value)]
    # As many as leave room for two programs; queries that are not rotated stay in shared memory.
    stages = 2 if padded_dim > 128 or (described and angles is None) else 3
    _chunk[(heads, len(items))](
        query, key, value, *tiles, cos, sin, keys, values, pages, table_starts, items, starts,
        lengths, partial, weights, out,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), cos.stride(0), out.stride(0), keys.stride(0),
        scaling, softcap, UNBOUNDED if window is None else window,
        keys.shape[1], kv_heads, heads // kv_heads,
        dim, padded_dim, tile_rows, BLOCK, softcap > 0, window is not None,
        angles is not None, parts > 0, described,
        num_warps=8 if tile_rows == 128 else 4, num_stages=stages,
    )  # fmt: skip
    if parts:
        _join[(heads, parts, tile_rows // _JOINED_ROWS)](
            partial, weights, items, starts, out, out.stride(0),
            heads, dim, padded_dim, tile_rows, _JOINED_ROWS, num_warps=4,
        )  # fmt: skip


def _suits(x: Tensor) -> bool:
    """Return whether a descriptor can describe x [rows, heads, dim], heads side by side."""
    side_by_side = x.stride(1) == x.shape[2] and x.shape[2] * x.itemsize >= _LEAST_BYTES
    return side_by_side and is_describable(x)


def _tiles(x: Tensor) -> TensorDescriptor:
    """Return a descriptor of x [rows, heads, dim], whose tiles are BLOCK rows of one head."""
    rows, heads, dim = x.shape
    return TensorDescriptor(x, [rows, heads * dim], [x.stride(0), 1], [BLOCK, dim])
