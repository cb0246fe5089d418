"""Tiles of prompt chunks: the list of them, and the chunk kernel that goes over it against plain
attention in float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pruning.attention import AttentionForm
from server.engine.attention.chunks import attend_chunks
from server.engine.attention.eight_bits import E4M3
from server.engine.attention.tiles import (
    BLOCK,
    Tiling,
    choose_tiling,
    chunk_items,
    count_tiles,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PAGE = 16
H100 = 132
"""Multiprocessors."""

FORMS = {
    "plain": (4, 2, 32, AttentionForm(0.2)),
    "no groups, no power of two": (2, 2, 24, AttentionForm(0.2)),
    "window": (4, 2, 32, AttentionForm(0.2, sliding_window=100)),
    "window shorter than a part": (2, 1, 32, AttentionForm(0.2, sliding_window=20)),
    "window, capped": (2, 1, 32, AttentionForm(0.5, sliding_window=300, softcap=3.0)),
    "capped": (2, 1, 32, AttentionForm(0.5, softcap=3.0)),
}
CHUNKS = {
    "whole prompts": [(150, 0), (64, 0), (65, 0), (2, 0)],
    "long prompts": [(420, 100), (300, 0)],
    "after a context": [(70, 129), (32, 500), (129, 64)],
    "beside single rows": [(1, 40), (33, 63), (1, 1), (1, 200), (40, 700), (1, 9)],
    "many and short": [(2 + 5 * i % 37, 11 * i % 90) for i in range(20)],
    "few after much": [(10, 1000)],
}
TILINGS = {
    "low": Tiling(64, 0),
    "low, cut": Tiling(64, 16),
    "high": Tiling(128, 0),
    "high, cut": Tiling(128, 16),
}


def items_of(counts: list[int], before: list[int], tiling: Tiling, room: int | None = None) -> list:
    """Return the items of all chunks, numbered among all sequences."""
    rows, seen = np.array(counts), np.array(counts) + np.array(before)
    (chunk,) = (rows > 1).nonzero()
    return chunk_items(chunk, rows[chunk], seen[chunk], tiling, room).tolist()


def test_every_row_is_in_one_tile_and_every_tile_is_whole() -> None:
    draw = np.random.default_rng(0)
    cut = 0
    for _ in range(300):
        count = int(draw.integers(1, 8))
        rows = draw.integers(1, 200, count)
        before = draw.integers(0, 3000, count) * draw.integers(0, 2, count)
        tiling = choose_tiling(int(rows.sum()), int(draw.integers(1, 65)), 64, H100)
        tiles = int(count_tiles(rows, tiling).sum())
        room = None if draw.integers(2) else tiles + int(draw.integers(0, 30))
        items = items_of(rows.tolist(), before.tolist(), tiling, room)
        assert room is None or len(items) <= room
        whole = [(sequence, first) for sequence, first, part, _ in items if part == 0]
        assert sorted(whole) == [
            (sequence, first)
            for sequence, own in enumerate(rows.tolist())
            if own > 1
            for first in range(0, own, tiling.rows)
        ]
        for at, (sequence, first, part, parts) in enumerate(items):
            assert items[at - part] == [sequence, first, 0, parts]
            assert items[at - part + parts - 1] == [sequence, first, parts - 1, parts]
        parted = [parts > 1 for *_, parts in items]
        assert parted == sorted(parted, reverse=True)
        assert sum(parted) <= tiling.most_parts
        cut += any(parted)
    assert cut > 30


def test_tiles_that_see_most_go_first() -> None:
    items = items_of([150, 40], [0, 100], Tiling(64, 0))
    assert items == [[0, 128, 0, 1], [1, 0, 0, 1], [0, 64, 0, 1], [0, 0, 0, 1]]


def test_long_tiles_keep_to_their_sequence_and_short_ones_fill_the_end() -> None:
    items = items_of([1152, 1088], [0, 0], Tiling(64, 0))
    tiles = [(sequence, first // 64) for sequence, first, *_ in items]
    assert tiles[:5] == [(0, 17), (0, 16), (0, 15), (1, 16), (1, 15)]
    assert tiles[5:9] == [(0, 14), (1, 14), (0, 13), (1, 13)]


def test_few_rows_after_much_are_cut_into_equal_shares() -> None:
    """17 blocks over eight places: six parts of three blocks."""
    tiling = choose_tiling(64, 32, 128, H100)
    assert items_of([32], [1024], tiling) == [[0, 0, part, 6] for part in range(6)]
    assert len(items_of([32], [1024], tiling, room=1)) == 1
    assert len(items_of([32] * 8, [1024] * 8, tiling)) == 8
    assert len(items_of([64], [0], tiling)) == 1
    assert len(items_of([32], [2 * BLOCK], tiling)) == 1


@pytest.mark.parametrize("rows", [64, 256, 512, 768, 1024, 1536, 2048])
def test_a_recorded_step_has_room_for_many_prompts(rows: int) -> None:
    tiling = choose_tiling(rows, 32, 128, H100)
    assert (tiling.rows, tiling.programs) == (64, 8 if rows <= 256 else 0)
    prompts = {64: 16, 256: 32}.get(rows, 64)
    lengths = np.full(prompts, rows // prompts) + np.where(np.arange(prompts) % 2, 1, -1)
    assert lengths.sum() == rows
    assert count_tiles(lengths, tiling).sum() <= tiling.most_items(rows)
    assert count_tiles(np.array([rows]), tiling).sum() <= tiling.most_items(rows)


def test_wide_heads_run_one_program_at_a_time() -> None:
    assert choose_tiling(64, 16, 256, H100) == Tiling(64, 8)
    assert choose_tiling(64, 16, 128, H100) == Tiling(64, 16)


def test_tiles_whose_parts_would_not_run_at_once_stay_whole() -> None:
    """Of 40 heads six items fill the device: of four tiles, two would be cut and two not."""
    tiling = choose_tiling(256, 40, 128, H100)
    assert tiling.programs == 6
    assert [parts for *_, parts in items_of([200], [2048], tiling)] == [1] * 4
    assert [parts for *_, parts in items_of([100], [2048], tiling)] == [3] * 6
    assert items_of([1, 1], [5, 6], tiling) == []


@dataclass
class Step:
    """Random rows, and pages behind block tables in random order."""

    counts: list[int]
    before: list[int]
    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    tables: list[Tensor]

    @classmethod
    def of(
        cls, chunks: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, eight: bool
    ) -> Step:
        torch.manual_seed(0)
        counts, before = [rows for rows, _ in chunks], [tokens for _, tokens in chunks]
        each = [-(-(rows + tokens) // PAGE) for rows, tokens in chunks]
        order = torch.randperm(sum(each)).to(torch.int32)
        pool = torch.randn(2, sum(each), PAGE, kv_heads, dim).to(E4M3 if eight else DTYPE)
        rows = [torch.randn(sum(counts), n, dim).to(DTYPE) for n in (heads, kv_heads, kv_heads)]
        return cls(counts, before, *rows, *pool, list(order.split(each)))

    def attended(self, tiling: Tiling, form: AttentionForm, room: int | None) -> Tensor:
        """Return [rows, heads, dim] by the kernel, NaN where it writes nothing."""
        items = items_of(self.counts, self.before, tiling, room)
        parts = sum(parts > 1 for *_, parts in items)
        if room is not None:
            items += [[-1, -1, -1, -1]] * (room - len(items))
            parts = min(room, tiling.most_parts)
        counts, before = torch.tensor(self.counts), torch.tensor(self.before)
        sizes = torch.tensor([len(table) for table in self.tables])
        vectors = (
            torch.cat(self.tables),
            sizes.cumsum(0) - sizes,
            torch.tensor(items),
            torch.cat([torch.zeros(1), counts.cumsum(0)]),
            counts + before,
        )
        out = torch.full_like(self.query, float("nan")).to(DEVICE)
        attend_chunks(
            *(x.to(DEVICE) for x in (self.query, self.key, self.value, self.keys, self.values)),
            *(x.to(DEVICE, torch.int32) for x in vectors),
            out,
            tile_rows=tiling.rows,
            parts=parts,
            scaling=form.scaling,
            window=form.sliding_window,
            softcap=form.softcap or 0.0,
        )
        return out.cpu().double()

    def expected(self, form: AttentionForm) -> Tensor:
        """Return what softmax(q k) v gives, sequence by sequence; NaN for single rows."""
        out = torch.full(self.query.shape, float("nan"), dtype=torch.float64)
        start = 0
        for rows, before, table in zip(self.counts, self.before, self.tables, strict=True):
            own = slice(start, start + rows)
            start += rows
            if rows == 1:
                continue
            groups = self.query.shape[1] // self.key.shape[1]
            k, v = (
                torch.cat([pages[table.long()].flatten(0, 1)[:before].double(), new[own].double()])
                .repeat_interleave(groups, 1)
                .transpose(0, 1)
                for pages, new in ((self.keys, self.key), (self.values, self.value))
            )
            scores = self.query[own].double().transpose(0, 1) @ k.mT * form.scaling
            if form.softcap is not None:
                scores = form.softcap * torch.tanh(scores / form.softcap)
            behind = before + torch.arange(rows)[:, None] - torch.arange(before + rows)
            hidden = (behind < 0) | (behind >= (form.sliding_window or behind.numel()))
            scores.masked_fill_(hidden, float("-inf"))
            out[own] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out


def test_what_is_wrong_with_one_sequence_stays_there() -> None:
    """Its numbers may be none (inf - inf): not even multiplied by zero they reach another one."""
    form = AttentionForm(scaling=0.25)
    step = Step.of([(70, 0), (5, 0), (130, 20)], 4, 2, 16, eight=False)
    good = step.attended(Tiling(64, 0), form, None)
    step.key[70:75] = step.value[70:75] = float("nan")
    got = step.attended(Tiling(64, 0), form, None)
    assert got[70:75].isnan().all()
    assert torch.equal(got[:70], good[:70])
    assert torch.equal(got[75:], good[75:])


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_tiles_give_what_plain_attention_gives(
    chunks: list[tuple[int, int]], tiling: Tiling
) -> None:
    check(FORMS["plain"], chunks, tiling)


@pytest.mark.parametrize("eight", [False, True], ids=["", "eight bits"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_parts_give_what_plain_attention_gives(
    form: tuple[int, int, int, AttentionForm], eight: bool
) -> None:
    """Beside tiles that are whole, single rows and padding."""
    tiling = TILINGS["low, cut"]
    chunks = [*CHUNKS["beside single rows"], (100, 0)]
    kinds = [parts for *_, parts in items_of(*map(list, zip(*chunks, strict=True)), tiling, 40)]
    assert min(kinds) == 1
    assert max(kinds) > 2
    check(form, chunks, tiling, room=40, eight=eight)


def check(
    shape: tuple[int, int, int, AttentionForm],
    chunks: list[tuple[int, int]],
    tiling: Tiling,
    room: int | None = None,
    eight: bool = False,
) -> None:
    heads, kv_heads, dim, form = shape
    step = Step.of(chunks, heads, kv_heads, dim, eight)
    got, expected = step.attended(tiling, form, room), step.expected(form)
    chunked = torch.tensor(step.counts).repeat_interleave(torch.tensor(step.counts)) > 1
    assert got[~chunked].isnan().all()
    assert got[chunked].isfinite().all()
    error = (got - expected)[chunked].flatten(1).norm(dim=1)
    assert (error / expected[chunked].flatten(1).norm(dim=1)).max() < (2e-2 if ON_GPU else 1e-5)
