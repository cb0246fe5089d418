"""The benchmark of attention kernels, but for its timings, which need a GPU: what chunks it hands
to them, and their ceiling."""

from __future__ import annotations

import pytest
import typer
from transformers import LlamaConfig

pytest.importorskip("triton")

from benchmarks.attention import Heads, _as_served, _chunk_floor, _chunk_sizes
from benchmarks.roofline import Rows, step_bytes, step_operations

HEADS = Heads(8, 2)
CONFIG = LlamaConfig(
    hidden_size=1024, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1
)


def test_chunks_are_read() -> None:
    assert _chunk_sizes("8x32+1024") == (8, 32, 1024)
    assert _chunk_sizes("32x64") == (32, 64, 0)
    for wrong in ("32", "0x64", "8x1+1024", "8x32-1"):
        with pytest.raises(typer.BadParameter, match="chunk"):
            _chunk_sizes(wrong)


@pytest.mark.parametrize("before", [0, 100])
def test_the_floor_is_what_the_roofline_counts_for_attention(before: int) -> None:
    """What a layer with attention needs more than one without, less its weights' share."""
    prompts, tokens = 3, 40
    rows = prompts * tokens
    floor = _chunk_floor(HEADS, prompts, tokens, before, kv_bytes=1)
    with_it, without = (Rows(prompts, tokens, before, layers) for layers in (1, 0))
    matrices = 2 * 1024 * 8 * 128 + 2 * 1024 * 2 * 128
    operations = step_operations(CONFIG, [with_it]) - step_operations(CONFIG, [without])
    assert floor.operations == operations - 2 * matrices * rows
    moved = step_bytes(CONFIG, 2, [with_it], 1) - step_bytes(CONFIG, 2, [without], 1)
    pages = moved - 2 * (matrices + 1024)
    # Of which the rows' own are read from the step, in 16 bits.
    own = 2 * rows * 2 * 128
    assert floor.bytes == pages - own + 2 * own + 2 * 2 * rows * 8 * 128


def test_what_is_served_is_padded_where_such_a_step_is_recorded() -> None:
    padded, alone = _as_served(HEADS, 1, 32, 1024, 132)
    assert len(padded.items) == padded.tiling.most_items(64) > len(alone.items) > 1
    assert (padded.items[: len(alone.items)] == alone.items).all()
    assert (padded.items[len(alone.items) :] == -1).all()
    assert padded.parts >= alone.parts == len(alone.items)
    many, own = _as_served(HEADS, 65, 64, 0, 132)
    assert len(many.items) == len(own.items) == 65
