"""Where a recorded step finds its inputs: one vector of int32 on the device, by fixed places.

A graph is recorded for one shape and holds the addresses of what it reads, so every step of that
shape lays its numbers out alike. Rows of padding attend nothing, write nothing, and what is
computed for them is never read. There are two kinds of steps:

    SingleRows    every sequence has one row, as in decoding
    Chunks        some have more, as prompts do; sequences and rows are padded apart

A shape is the padded rows of each variant. Knows numpy for the host's side and tensors for the
device's; launches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pruning.variants import Variants
from server.engine.attention.paged import Chunks as ChunkStep
from server.engine.attention.paged import GroupStep, Singles
from server.engine.attention.tiles import Tiling, chunk_items, count_tiles
from server.engine.batch import Batch, GroupRows, attending_by_group, by_layer, mlp_rows
from server.engine.transfer import aligned_starts

Shape = tuple[int, ...]
"""Padded rows of each variant."""

Ints = NDArray[np.int64]
Filled = NDArray[np.int32]


class Layout(Protocol):
    """The inputs of one shape."""

    attending_rows: list[int]
    """Per layer."""
    mlp_rows: tuple[int, ...] | None
    """Per layer; None where no variant drops any."""
    size: int
    """Numbers before the block tables."""

    def rows(self, batch: Batch) -> Ints:
        """Return the padded row of each row of a batch."""
        ...

    def places(self, batch: Batch) -> Ints:
        """Return the place of each sequence of a batch among the logits."""
        ...

    def padding(self) -> Filled:
        """Return inputs of which every row is padding."""
        ...

    def fill(self, batch: Batch, sources: Ints) -> Filled:
        """Return the inputs of a batch, block tables included; `sources` as the runner has them."""
        ...

    def token_ids(self, inputs: Tensor) -> Tensor: ...
    def sources(self, inputs: Tensor) -> Tensor: ...
    def positions(self, inputs: Tensor) -> Tensor: ...

    def logit_rows(self, inputs: Tensor) -> Tensor | None:
        """Return the rows that logits are computed of, by place; None: all, in order."""
        ...

    def bind(self, inputs: Tensor, longest: int) -> list[GroupStep | None]:
        """Return views of the inputs for the attention, per layer group; no sequence is longer than
        `longest`."""
        ...


class _Vectors:
    """Vectors of given sizes behind one another, on the host and on the device."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._starts = aligned_starts(sizes)
        self.size = self._starts[-1]

    def of(self, filled: Filled, place: int) -> Filled:
        start = self._starts[place]
        return filled[start : start + self._sizes[place]]

    def view(self, inputs: Tensor, place: int) -> Tensor:
        start = self._starts[place]
        return inputs[start : start + self._sizes[place]]


class _Common:
    """What both kinds share: first of all the vectors of rows."""

    _TOKENS, _SOURCES, _POSITIONS = range(3)

    def __init__(self, shape: Shape, variants: Variants, sizes: Sequence[int]) -> None:
        self._first_rows = [0, *accumulate(shape)]
        self._group_rows = attending_by_group(variants, shape)
        self.attending_rows = list(by_layer(variants, self._group_rows))
        self.mlp_rows = mlp_rows(variants, shape)
        self._vectors = _Vectors([*[sum(shape)] * 3, *sizes])
        self.size = self._vectors.size

    def token_ids(self, inputs: Tensor) -> Tensor:
        return self._vectors.view(inputs, self._TOKENS)

    def sources(self, inputs: Tensor) -> Tensor:
        return self._vectors.view(inputs, self._SOURCES)

    def positions(self, inputs: Tensor) -> Tensor:
        return self._vectors.view(inputs, self._POSITIONS)

    def _blank(self) -> Filled:
        filled = np.zeros(self.size, dtype=np.int32)
        self._vectors.of(filled, self._SOURCES)[:] = -1
        return filled

    def _fill_rows(self, filled: Filled, batch: Batch, sources: Ints, rows: Ints) -> None:
        for place, values in enumerate((batch.token_ids, sources, batch.positions)):
            self._vectors.of(filled, place)[rows] = values


class SingleRows(_Common):
    """Inputs of a step in which every sequence has one row::

    rows      [ full full full - | pruned pruned ]      padded to (4, 2); "-" attends nothing
    inputs    [ token ids | sources | positions | lengths | slots, table starts per group | pages ]
    """

    _LENGTHS = 3

    def __init__(self, shape: Shape, variants: Variants) -> None:
        rows = attending_by_group(variants, shape)
        super().__init__(shape, variants, [sum(shape), *(n for n in rows for _ in range(2))])

    def rows(self, batch: Batch) -> Ints:
        return _places(self._first_rows, batch.variant_sequences)

    def places(self, batch: Batch) -> Ints:
        return self.rows(batch)

    def padding(self) -> Filled:
        filled = self._blank()
        for group in range(len(self._group_rows)):
            self._vectors.of(filled, self._slots(group))[:] = -1
        return filled

    def fill(self, batch: Batch, sources: Ints) -> Filled:
        filled, rows = self.padding(), self.rows(batch)
        self._fill_rows(filled, batch, sources, rows)
        self._vectors.of(filled, self._LENGTHS)[rows] = batch.lengths
        for index, (group, tables) in enumerate(_with_tables(batch, self.size)):
            attending = rows[: group.rows]
            self._vectors.of(filled, self._slots(index))[attending] = group.slots
            self._vectors.of(filled, self._slots(index) + 1)[attending] = tables
        return _with_pages(filled, batch)

    def logit_rows(self, inputs: Tensor) -> None:
        del inputs

    def bind(self, inputs: Tensor, longest: int) -> list[GroupStep | None]:
        lengths = self._vectors.view(inputs, self._LENGTHS)
        return [
            GroupStep(
                slots=self._vectors.view(inputs, self._slots(index)),
                pages=inputs,
                singles=Singles(
                    table_starts=self._vectors.view(inputs, self._slots(index) + 1),
                    rows=torch.arange(rows, dtype=torch.int32, device=inputs.device),
                    lengths=lengths[:rows],
                    longest=longest,
                ),
                chunks=None,
            )
            if rows
            else None
            for index, rows in enumerate(self._group_rows)
        ]

    def _slots(self, group: int) -> int:
        return self._LENGTHS + 1 + 2 * group


class Chunks(_Common):
    """Inputs of a step of prompt chunks and single rows.

    Every variant has a place for as many sequences as rows, up to a limit, and one more, which is
    empty::

        rows        [ a a a a b c c - - - | d d e - ]     padded to (10, 4); b and e are single rows
        sequences   [ a b c . . . . . . . . | d e . . . ]
        starts        0 4 5 7 ...             10 12 13 ...

    Sequences of one row and tiles of those of more are listed apart for attention, each list padded
    with -1.
    """

    _LOGIT_ROWS, _LENGTHS, _STARTS = 3, 4, 5
    _SLOTS, _TABLES, _ITEMS, _SINGLE_TABLES, _SINGLE_ROWS, _SINGLE_LENGTHS = range(6)
    """Vectors of a group, after those."""

    def __init__(
        self, shape: Shape, variants: Variants, most_sequences: int, tiling: Tiling
    ) -> None:
        """tiling is that of steps of as many rows as the shape has."""
        self._most_sequences, self._tiling = most_sequences, tiling
        self._held = tuple(min(rows, most_sequences) for rows in shape)
        self._first_logits = [0, *accumulate(self._held)]
        self._first_sequences = [0, *accumulate(held + 1 for held in self._held)]
        sequences = self._first_sequences[-1]
        singles = attending_by_group(variants, self._held)
        self._of_group = range(6, 6 + 6 * len(singles), 6)
        sizes = [sum(self._held), sequences, sequences + 1]
        group_rows = attending_by_group(variants, shape)
        self._most_items = [tiling.most_items(rows) for rows in group_rows]
        for rows, items, single in zip(group_rows, self._most_items, singles, strict=True):
            sizes += [rows, sequences, 4 * items, single, single, single]
        super().__init__(shape, variants, sizes)

    def holds(self, batch: Batch) -> bool:
        """Return whether there is room for a batch whose rows fit the shape."""
        if max(batch.variant_sequences) > self._most_sequences:
            return False
        tiles = np.cumsum(count_tiles(np.diff(batch.query_starts), self._tiling))
        return all(
            not group.sequences or tiles[group.sequences - 1] <= most
            for group, most in zip(batch.groups, self._most_items, strict=True)
        )

    def rows(self, batch: Batch) -> Ints:
        return _places(self._first_rows, rows_by_variant(batch))

    def places(self, batch: Batch) -> Ints:
        return _places(self._first_logits, batch.variant_sequences)

    def padding(self) -> Filled:
        filled = self._blank()
        for first in self._of_group:
            self._vectors.of(filled, first + self._SLOTS)[:] = -1
            self._vectors.of(filled, first + self._ITEMS)[:] = -1
            self._vectors.of(filled, first + self._SINGLE_ROWS)[:] = -1
        return filled

    def fill(self, batch: Batch, sources: Ints) -> Filled:
        filled, rows = self.padding(), self.rows(batch)
        self._fill_rows(filled, batch, sources, rows)
        counts = np.diff(batch.query_starts)
        sequences = _places(self._first_sequences, batch.variant_sequences)
        starts = rows[batch.query_starts[:-1]]
        ends = starts + counts
        self._vectors.of(filled, self._LOGIT_ROWS)[self.places(batch)] = ends - 1
        self._vectors.of(filled, self._LENGTHS)[sequences] = batch.lengths
        padded = self._vectors.of(filled, self._STARTS)
        padded[sequences + 1] = ends
        padded[sequences] = starts
        items: dict[tuple[int, int], Filled] = {}  # those of groups that all attend are the same
        for index, (group, tables) in enumerate(_with_tables(batch, self.size)):
            first, attending = self._of_group[index], sequences[: group.sequences]
            self._vectors.of(filled, first + self._SLOTS)[rows[: group.rows]] = group.slots
            self._vectors.of(filled, first + self._TABLES)[attending] = tables
            own = counts[: group.sequences]
            (chunk,), (single,) = (own > 1).nonzero(), (own == 1).nonzero()
            key = group.sequences, self._most_items[index]
            if key not in items:
                seen = batch.lengths[chunk]
                items[key] = chunk_items(sequences[chunk], own[chunk], seen, self._tiling, key[1])
            for vector, values in (
                (self._ITEMS, items[key].ravel()),
                (self._SINGLE_TABLES, tables[single]),
                (self._SINGLE_ROWS, starts[single]),
                (self._SINGLE_LENGTHS, batch.lengths[single]),
            ):
                self._vectors.of(filled, first + vector)[: len(values)] = values
        return _with_pages(filled, batch)

    def logit_rows(self, inputs: Tensor) -> Tensor:
        return self._vectors.view(inputs, self._LOGIT_ROWS)

    def bind(self, inputs: Tensor, longest: int) -> list[GroupStep | None]:
        return [
            self._bind(inputs, first, items, longest) if rows else None
            for first, items, rows in zip(
                self._of_group, self._most_items, self._group_rows, strict=True
            )
        ]

    def _bind(self, inputs: Tensor, first: int, items: int, longest: int) -> GroupStep:
        return GroupStep(
            slots=self._vectors.view(inputs, first + self._SLOTS),
            pages=inputs,
            singles=Singles(
                table_starts=self._vectors.view(inputs, first + self._SINGLE_TABLES),
                rows=self._vectors.view(inputs, first + self._SINGLE_ROWS),
                lengths=self._vectors.view(inputs, first + self._SINGLE_LENGTHS),
                longest=longest,
            ),
            chunks=ChunkStep(
                items=self._vectors.view(inputs, first + self._ITEMS).view(items, 4),
                table_starts=self._vectors.view(inputs, first + self._TABLES),
                starts=self._vectors.view(inputs, self._STARTS),
                lengths=self._vectors.view(inputs, self._LENGTHS),
                tile_rows=self._tiling.rows,
                parts=min(items, self._tiling.most_parts),
            ),
        )


def _places(firsts: Sequence[int], counts: Sequence[int]) -> Ints:
    """Return the numbers from each first one on, as many as its count."""
    parts = [np.arange(first, first + count) for first, count in zip(firsts, counts, strict=False)]
    return np.concatenate(parts)


def rows_by_variant(batch: Batch) -> tuple[int, ...]:
    """Return how many rows of a batch each variant has."""
    ends = batch.query_starts[np.cumsum(batch.variant_sequences)]
    return tuple(np.diff(ends, prepend=0).tolist())


def _with_tables(batch: Batch, first: int) -> Iterator[tuple[GroupRows, Ints]]:
    """Yield each group, and where its sequences' block tables start in inputs that hold all of
    them from `first` on."""
    for group in batch.groups:
        yield group, first + group.table_starts[:-1]
        first += len(group.pages)


def _with_pages(filled: Filled, batch: Batch) -> Filled:
    return np.concatenate([filled, *(group.pages for group in batch.groups)])
