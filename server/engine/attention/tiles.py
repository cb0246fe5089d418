"""What the chunk kernel goes over: tiles of prompt chunks, and parts of tiles that see much.

    a chunk of 150 rows after 1,024 tokens     rows 0-63 | 64-127 | 128-149
    one of 32 rows after 1,024 tokens          rows 0-31, in six parts of three blocks of tokens

An item is a tile or a part of one, (sequence, first row in the chunk, part, parts), and a program
of the kernel is one item and one head. How many items there are depends on the lengths, how many a
recorded step has room for on its rows alone. The tokens of a part are found on the device, where a
layer's window is known::

    [ . . . . . . . . . . . . . . . . . ]      17 blocks that a tile sees
      part 0| part 1| 2   | 3   | 4   |5       shares of equal blocks

numpy only: made while a step is laid out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 64
"""Tokens that the kernel takes at once."""

_FEW_ROWS = 256
"""Steps of up to so many cut tiles that see much. More rows fill a device by themselves."""
_TILE_ROWS = 64
"""Twice as many read each key less often, and were slower all the same (docs/performance.md)."""
_WIDE_HEAD = 128
"""Of wider heads a multiprocessor has registers and shared memory for one tile at a time."""
_LEAST_BLOCKS = 3
"""Blocks of a part: each has its own start and result, some blocks' worth of time."""
_LONG = 16
"""Blocks that a tile sees from which on it goes with others of its sequence: keys and values of one
long sequence find room in the L2 cache. Tiles that see less fill what is left idle at the end."""
_WORTHWHILE = 0.75
"""Of the longest tile's blocks, what its longest part must not exceed, or nothing is cut: tiles
that just do not fill the device would be cut into parts that do not all run at once."""
_PROMPTS = 16, 64
"""The least and the most chunks whose last tiles may be partly filled in a recorded step."""
_ROWS_PER_PROMPT = 8

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the chunks of a step are tiled."""

    rows: int
    """Of a tile."""
    programs: int
    """Items that fill the device: tiles are cut into parts until there are about as many. 0: none
    is cut."""

    @property
    def most_parts(self) -> int:
        """Items that may be parts: rounding makes a third more of them than were wanted."""
        return self.programs * 4 // 3

    def most_items(self, rows: int) -> int:
        """Return how many items a recorded step of so many rows has room for.

        Each whole tile, and one that is partly filled for each of a number of chunks: 16, or one
        of eight rows, but no more than 64. A place that stays empty costs each head a program that
        loads one number and returns. With 32 heads that makes 544 programs for 64 rows and 3,072
        for 2,048, of which a device with 132 multiprocessors holds 264 at a time.
        """
        least, most = _PROMPTS
        return rows // self.rows + min(most, max(least, rows // _ROWS_PER_PROMPT))


def choose_tiling(rows: int, heads: int, dim: int, multiprocessors: int) -> Tiling:
    """Return the tiling of steps of so many rows, padding included."""
    resident = 2 if dim <= _WIDE_HEAD else 1
    programs = resident * multiprocessors // heads if rows <= _FEW_ROWS else 0
    return Tiling(_TILE_ROWS, programs)


def count_tiles(counts: Ints, tiling: Tiling) -> Ints:
    """Return how many tiles each sequence has, of so many rows. Single rows have none."""
    return np.where(counts > 1, -(-counts // tiling.rows), 0)


def chunk_items(
    sequences: Ints, counts: Ints, lengths: Ints, tiling: Tiling, room: int | None = None
) -> NDArray[np.int32]:
    """Return the items [items, 4] of chunks, no more than `room` if their tiles are not.

    sequences are their numbers, counts their rows, all more than one, and lengths their tokens, all
    [chunks]. Parts come before whole tiles, those of a tile together, and each kind heaviest first,
    but that tiles which see much keep to their sequence.
    """
    tiles = -(-counts // tiling.rows)
    owner = np.arange(len(tiles)).repeat(tiles)
    first = _numbered(tiles) * tiling.rows
    own = counts[owner]
    blocks = -(-(lengths[owner] - own + np.minimum(first + tiling.rows, own)) // BLOCK)
    parts = _parts(blocks, tiling, room)
    is_long = blocks >= _LONG
    order = np.lexsort((-blocks, owner * is_long, ~is_long, parts == 1))
    parts = parts[order]
    tile = order.repeat(parts)
    items = np.empty((len(tile), 4), dtype=np.int32)
    items[:, 0], items[:, 1] = sequences[owner[tile]], first[tile]
    items[:, 2], items[:, 3] = _numbered(parts), parts.repeat(parts)
    return items


def _parts(blocks: Ints, tiling: Tiling, room: int | None) -> Ints:
    """Return into how many parts each tile is cut that sees so many blocks: equal shares of them
    all, rounded, so that two parts have at least one and a half shares between them."""
    wanted = tiling.programs
    if room is not None:
        wanted = min(wanted, (room - len(blocks)) * 3 // 4)
    whole = np.ones_like(blocks)
    if not len(blocks) or wanted <= len(blocks):
        return whole
    share = max(_LEAST_BLOCKS, -(-int(blocks.sum()) // wanted))
    parts = np.maximum((blocks + share // 2) // share, 1)
    longest = int((-(-blocks // parts)).max())
    return parts if longest <= _WORTHWHILE * int(blocks.max()) else whole


def _numbered(counts: Ints) -> Ints:
    """Return 0 to count - 1 for each count, one after the other."""
    ends = counts.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) - (ends - counts).repeat(counts)
