"""One layer's attention over pages on a GPU, by splits, beside bandwidth and FlashInfer.

    python -m benchmarks.attention --heads 32/8,40/40 --batch 1,8,16,32,128 --context 2048
    python -m benchmarks.attention --batch "" --chunks 1x32+1024,8x32+1024,32x64,1x2048

Decode: one row a sequence. The ceiling is the bytes of keys and values over the copy bandwidth of
this run; "chosen" is what the server's rule takes. Chunks: prompts, some of which go on after
earlier chunks. Their ceiling is the longer of their bytes over the copy bandwidth and their
operations over the matrix rate. "ours" is as a recorded step has it, places that stay empty
included; beside it the same without those, and tiles of either height of which none is cut into
parts. Whole prompts run by torch's own kernels too, which want keys and values side by side.
FlashInfer's kernels run on the same pages where it is installed (it
compiles them at first use, which is not counted; what it plans on the host each step is shown).

With --kv-cache-dtype fp8, pages hold eight bits, and FlashInfer does not run.

Kernels run in a CUDA graph, over as many layers as do not fit the device's cache together.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.inprocess import machine
from benchmarks.roofline import (
    Ceilings,
    Floor,
    copies_beyond_cache,
    graph_seconds,
    measure_ceilings,
)
from server.engine.assembly import KvCacheDtype, kv_dtype
from server.engine.attention import kernels
from server.engine.attention.chunks import attend_chunks
from server.engine.attention.paged import choose_splits
from server.engine.attention.tiles import Tiling, choose_tiling, chunk_items, count_tiles
from server.engine.graphs import CHUNK_SIZES
from server.engine.multiprocessor import multiprocessors

_DIM, _PAGE = 128, 16
_SPLITS = (1, 2, 4, 8, 16, 32)
_TILE_ROWS = (64, 128)
_REPEATS = 20
_CHUNK = re.compile(r"(\d+)x(\d+)(?:\+(\d+))?")
_TORCH = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


@dataclass(frozen=True, slots=True)
class Heads:
    """Query and key-value heads of a layer."""

    query: int
    kv: int

    def __str__(self) -> str:
        return f"{self.query}/{self.kv}"


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values of several layers, and block tables of as many sequences."""

    pool: Tensor
    """[pages, layers, 2, tokens per page, kv heads, dim]"""
    tables: Tensor
    """[sequences, pages each], int32"""
    context: int

    @property
    def layers(self) -> int:
        return self.pool.shape[1]

    def layer(self, at: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, [pages, tokens per page, kv heads, dim]."""
        return self.pool[:, at, 0], self.pool[:, at, 1]


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Microseconds of one layer."""

    heads: str
    batch: int
    context: int
    by_splits: dict[int, float]
    chosen: int
    microseconds: float
    ceiling: float
    flashinfer: float | None
    flashinfer_plan: float | None


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """Microseconds of one layer, of all prompts together."""

    heads: str
    prompts: int
    tokens: int
    before: int
    """Tokens of each that earlier chunks have put into pages."""
    operations: float
    ceiling: float
    tile_rows: int
    items: int
    places: int
    """For items; more than there are where such a step is recorded."""
    microseconds: float
    unpadded: float
    uncut: dict[int, float]
    """By rows of a tile, of which none is cut into parts; unpadded."""
    torch: dict[str, float]
    """By torch's kernels, from contiguous keys and values; only where nothing came before."""
    flashinfer: float | None


def main(
    heads: Annotated[str, typer.Option(help="Query/kv heads.")] = "32/8,40/40",
    batch: Annotated[str, typer.Option(help="Sequences.")] = "1,8,16,32,128",
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    chunks: Annotated[
        str, typer.Option(help="Prompts x tokens, + tokens that are in pages already.")
    ] = "1x2048,4x512,1x2048+2048",
    kv_cache_dtype: Annotated[KvCacheDtype, typer.Option(help="As of the server.")] = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure attention kernels."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("these kernels need a CUDA device")
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, torch.bfloat16)
    shapes = [Heads(*map(int, part.split("/"))) for part in heads.split(",")]
    batches = [int(part) for part in batch.split(",") if part]
    parts = [_chunk_sizes(part) for part in chunks.split(",") if part]
    dtype = kv_dtype(kv_cache_dtype, torch.bfloat16)
    decode = [
        _decode(shape, count, context, dtype, ceilings) for shape in shapes for count in batches
    ]
    whole = [_chunk(shape, *sizes, dtype, ceilings) for shape in shapes for sizes in parts]
    console = Console(width=160)
    console.print(_decode_table(decode))
    console.print(_chunk_table(whole))
    if output is not None:
        body = {
            "machine": machine(device),
            "kv_cache_dtype": kv_cache_dtype,
            "ceilings": asdict(ceilings),
            "decode": [asdict(row) for row in decode],
            "chunks": [asdict(row) for row in whole],
        }
        output.write_text(json.dumps(body, indent=2) + "\n")


def _chunk_sizes(text: str) -> tuple[int, int, int]:
    """Return prompts, tokens and tokens before of a text like 1x2048 or 1x2048+2048."""
    if (match := _CHUNK.fullmatch(text)) is None:
        raise typer.BadParameter(f"a chunk is written like 1x2048 or 1x2048+2048, not {text!r}")
    prompts, tokens, before = int(match[1]), int(match[2]), int(match[3] or 0)
    if not prompts or tokens < 2:
        raise typer.BadParameter(f"{text} is no chunk: one prompt and two tokens are the least")
    return prompts, tokens, before


def _decode(
    heads: Heads, batch: int, context: int, dtype: torch.dtype, ceilings: Ceilings
) -> DecodeRow:
    pages = _pages(heads, batch, context, dtype)
    query = torch.randn(batch, heads.query, _DIM, dtype=torch.bfloat16, device="cuda")
    tiling = kernels.decode_tiling(heads.query, heads.kv, _DIM)
    held = tiling.resident * multiprocessors(query.device)
    chosen = choose_splits(batch * heads.kv, held, context)
    by_splits = {splits: _time(_ours(query, pages, splits), pages) for splits in _SPLITS}
    moved = 2 * batch * context * heads.kv * _DIM * dtype.itemsize
    theirs = _flashinfer_decode(query, heads, pages)
    return DecodeRow(
        heads=str(heads),
        batch=batch,
        context=context,
        by_splits=by_splits,
        chosen=chosen,
        microseconds=by_splits[chosen],
        ceiling=moved / ceilings.copy_bytes_per_second * 1e6,
        flashinfer=theirs and theirs[0],
        flashinfer_plan=theirs and theirs[1],
    )


def _ours(query: Tensor, pages: Pages, splits: int) -> Callable[[int], None]:
    """Attend one row of each sequence and write its key and value, as in a step of decoding."""
    batch, kv_heads, last = len(query), pages.pool.shape[-2], pages.context - 1
    row = torch.zeros(batch, kv_heads, _DIM, dtype=query.dtype, device=query.device)
    numbers = torch.arange(batch, dtype=torch.int32, device=query.device)
    slots = pages.tables[:, last // _PAGE] * _PAGE + last % _PAGE
    starts, lengths = numbers * pages.tables.shape[1], torch.full_like(numbers, pages.context)
    out, angles = torch.empty_like(query), _angles(batch)

    def attend(layer: int) -> None:
        kernels.decode(
            query, row, row, *pages.layer(layer), pages.tables, starts, numbers, slots, lengths,
            out, writes=True, scaling=_DIM**-0.5, window=None, softcap=0.0, splits=splits,
            angles=angles,
        )  # fmt: skip

    return attend


def _chunk(
    heads: Heads, prompts: int, tokens: int, before: int, dtype: torch.dtype, ceilings: Ceilings
) -> ChunkRow:
    pages = _pages(heads, prompts, before + tokens, dtype)
    rows = prompts * tokens
    query, key, value = (
        torch.randn(rows, count, _DIM, dtype=torch.bfloat16, device="cuda")
        for count in (heads.query, heads.kv, heads.kv)
    )
    starts = torch.arange(prompts + 1, dtype=torch.int32, device="cuda") * tokens
    numbers = torch.arange(prompts, dtype=torch.int32, device="cuda")
    tables, lengths = numbers * pages.tables.shape[1], torch.full_like(numbers, before + tokens)
    out, angles = torch.empty_like(query), _angles(rows)

    def ours(tiled: Tiled) -> float:
        items = torch.from_numpy(tiled.items).cuda()

        def attend(layer: int) -> None:
            attend_chunks(
                query, key, value, *pages.layer(layer),
                pages.tables, tables, items, starts, lengths, out,
                tile_rows=tiled.tiling.rows, parts=tiled.parts,
                scaling=_DIM**-0.5, window=None, softcap=0.0, angles=angles,
            )  # fmt: skip

        return _time(attend, pages)

    chosen, unpadded = _as_served(heads, prompts, tokens, before, multiprocessors(query.device))
    floor = _chunk_floor(heads, prompts, tokens, before, dtype.itemsize)
    return ChunkRow(
        heads=str(heads),
        prompts=prompts,
        tokens=tokens,
        before=before,
        operations=floor.operations,
        ceiling=floor.seconds(ceilings) * 1e6,
        tile_rows=chosen.tiling.rows,
        items=len(unpadded.items),
        places=len(chosen.items),
        microseconds=ours(chosen),
        unpadded=ours(unpadded),
        uncut={
            height: ours(Tiled.of(prompts, tokens, before, Tiling(height, programs=0)))
            for height in _TILE_ROWS
        },
        torch={
            kind.name: _torch_chunk(query, key, value, prompts, kind)
            for kind in _TORCH
            if before == 0
        },
        flashinfer=_flashinfer_chunk(query, heads, pages, tokens),
    )


@dataclass(frozen=True, slots=True)
class Tiled:
    """Chunks as the kernel gets them."""

    tiling: Tiling
    items: NDArray[np.int32]
    parts: int
    """Items that may be parts of tiles."""

    @classmethod
    def of(
        cls, prompts: int, tokens: int, before: int, tiling: Tiling, room: int | None = None
    ) -> Tiled:
        numbers, counts = np.arange(prompts), np.full(prompts, tokens)
        items = chunk_items(numbers, counts, counts + before, tiling, room)
        return cls(tiling, items, int((items[:, 3] > 1).sum()))


def _as_served(
    heads: Heads, prompts: int, tokens: int, before: int, multiprocessors: int
) -> tuple[Tiled, Tiled]:
    """Return what a server gives the kernel, and that without places that stay empty: a step of the
    least recorded size with room for it or, where there is none, one of its own size."""
    rows = prompts * tokens
    for size in (size for size in CHUNK_SIZES if size >= rows):
        tiling = choose_tiling(size, heads.query, _DIM, multiprocessors)
        room = tiling.most_items(size)
        if count_tiles(np.full(prompts, tokens), tiling).sum() <= room:
            tiled = Tiled.of(prompts, tokens, before, tiling, room)
            empty = np.full((room - len(tiled.items), 4), -1, np.int32)
            padded = np.concatenate([tiled.items, empty])
            return Tiled(tiling, padded, min(room, tiling.most_parts)), tiled
    tiling = choose_tiling(rows, heads.query, _DIM, multiprocessors)
    tiled = Tiled.of(prompts, tokens, before, tiling)
    return tiled, tiled


def _chunk_floor(heads: Heads, prompts: int, tokens: int, before: int, kv_bytes: int) -> Floor:
    """Return what chunks must move, queries, outputs and each key and value once, and compute."""
    rows = prompts * tokens
    moved = 2 * 2 * rows * _DIM * (heads.query + heads.kv)
    moved += 2 * prompts * before * _DIM * heads.kv * kv_bytes
    return Floor(moved, 4 * heads.query * _DIM * rows * (before + (tokens + 1) / 2))


def _angles(rows: int) -> kernels.Angles:
    """Return what the kernels rotate by as in a model's layer: by nothing, which takes as long."""
    cos = torch.ones(rows, _DIM, dtype=torch.bfloat16, device="cuda")
    return kernels.Angles(cos, torch.zeros_like(cos))


def _pages(heads: Heads, sequences: int, context: int, dtype: torch.dtype) -> Pages:
    """Return random pages in random order."""
    each = -(-context // _PAGE)
    layer_bytes = sequences * each * _PAGE * 2 * heads.kv * _DIM * dtype.itemsize
    layers = copies_beyond_cache(layer_bytes)
    pool = torch.randn(
        sequences * each, layers, 2, _PAGE, heads.kv, _DIM, dtype=torch.bfloat16, device="cuda"
    ).to(dtype)
    order = torch.randperm(sequences * each, device="cuda").to(torch.int32)
    return Pages(pool, order.view(sequences, each), context)


def _time(work: Callable[[int], object], pages: Pages) -> float:
    """Return the median microseconds of `work` on a layer."""
    return graph_seconds(work, pages.layers, _REPEATS) * 1e6


def _repeated(work: Callable[[int], object]) -> float:
    """Return the median microseconds of `work` on the same data."""
    return graph_seconds(work, 4, _REPEATS) * 1e6


# The peers.


def _torch_chunk(
    query: Tensor, key: Tensor, value: Tensor, prompts: int, kind: SDPBackend
) -> float:
    """Return microseconds of one of torch's kernels on whole prompts."""
    q, k, v = (x.view(prompts, -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(kind):
        return _repeated(
            lambda _: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        )


def _flashinfer_decode(query: Tensor, heads: Heads, pages: Pages) -> tuple[float, float] | None:
    """Return microseconds of FlashInfer's better decode kernel, and of its planning."""
    if not _flashinfer_runs(pages):
        return None

    def plan(wrapper: Any) -> None:
        sizes = heads.query, heads.kv, _DIM, _PAGE
        wrapper.plan(*_tables(pages), *sizes, q_data_type=query.dtype)

    make = _flashinfer().BatchDecodeWithPagedKVCacheWrapper
    kinds = [partial(make, kv_layout="NHD", use_tensor_cores=cores) for cores in (False, True)]
    return min(_planned(kind, plan, query, pages) for kind in kinds)


def _flashinfer_chunk(query: Tensor, heads: Heads, pages: Pages, tokens: int) -> float | None:
    """Return microseconds of FlashInfer's kernel for prompts, of which `tokens` are new."""
    if not _flashinfer_runs(pages):
        return None
    sequences = len(pages.tables)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * tokens

    def plan(wrapper: Any) -> None:
        sizes = heads.query, heads.kv, _DIM, _PAGE
        wrapper.plan(starts, *_tables(pages), *sizes, causal=True, q_data_type=query.dtype)

    make = partial(_flashinfer().BatchPrefillWithPagedKVCacheWrapper, kv_layout="NHD")
    return _planned(make, plan, query, pages)[0]


def _flashinfer_runs(pages: Pages) -> bool:
    return find_spec("flashinfer") is not None and pages.pool.dtype.itemsize == 2


def _flashinfer() -> Any:
    return importlib.import_module("flashinfer")


def _planned(
    make: Callable[[Tensor], Any], plan: Callable[[Any], object], query: Tensor, pages: Pages
) -> tuple[float, float]:
    """Return microseconds of a wrapper's run, and of its plan."""
    wrapper = make(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"))
    plan(wrapper)
    planning = statistics.median(_seconds(lambda: plan(wrapper)) for _ in range(_REPEATS))
    run = _time(lambda layer: wrapper.run(query, pages.layer(layer)), pages)
    return run, planning * 1e6


def _tables(pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
    """Return FlashInfer's form of block tables: starts, pages, tokens in the last page."""
    sequences, each = pages.tables.shape
    starts = torch.arange(sequences + 1, dtype=torch.int32) * each
    last = torch.full((sequences,), (pages.context - 1) % _PAGE + 1, dtype=torch.int32)
    return starts.cuda(), pages.tables.flatten(), last.cuda()


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# What is printed.


def _decode_table(rows: list[DecodeRow]) -> Table:
    table = Table(title="decode, microseconds a layer")
    splits = [f"{splits} splits" for splits in _SPLITS]
    for name in ("heads", "batch", "ceiling", "chosen", "us", "of ceiling", "of best", *splits):
        table.add_column(name, justify="right")
    table.add_column("FlashInfer (plan)", justify="right")
    for row in rows:
        peer = f"{row.flashinfer:.1f} ({row.flashinfer_plan:.0f})" if row.flashinfer else "-"
        table.add_row(
            row.heads,
            str(row.batch),
            f"{row.ceiling:.1f}",
            str(row.chosen),
            f"{row.microseconds:.1f}",
            f"{row.microseconds / row.ceiling:.2f}x",
            f"{row.microseconds / min(row.by_splits.values()):.2f}x",
            *(f"{row.by_splits[splits]:.1f}" for splits in _SPLITS),
            peer,
        )
    return table


def _chunk_table(rows: list[ChunkRow]) -> Table:
    table = Table(title="chunks, microseconds a layer (TFLOP/s)")
    kinds = [kind.name.removesuffix("_ATTENTION") for kind in _TORCH]
    for name in ("heads", "chunks", "ceiling", "ours", "of ceiling", "tile rows", "items"):
        table.add_column(name, justify="right")
    for name in ("unpadded", *(f"{height}, uncut" for height in _TILE_ROWS), *kinds, "FlashInfer"):
        table.add_column(name, justify="right")
    for row in rows:

        def timed(microseconds: float | None, row: ChunkRow = row) -> str:
            if microseconds is None:
                return "-"
            return f"{microseconds:.1f} ({row.operations / microseconds / 1e6:.0f})"

        table.add_row(
            row.heads,
            f"{row.prompts}x{row.tokens}" + (f"+{row.before}" if row.before else ""),
            timed(row.ceiling),
            timed(row.microseconds),
            f"{row.microseconds / row.ceiling:.2f}x",
            str(row.tile_rows),
            f"{row.items} of {row.places}",
            timed(row.unpadded),
            *(timed(row.uncut[height]) for height in _TILE_ROWS),
            *(timed(row.torch.get(kind.name)) for kind in _TORCH),
            timed(row.flashinfer),
        )
    return table


if __name__ == "__main__":
    typer.run(main)
