"""Small steps recorded once as CUDA graphs, for each padded number of rows per variant.

A step is a few hundred kernels; launching them one by one takes longer than running them, 25 ms
for a model of 32 layers, unless there are many rows. A graph launches all of them at once. It reads
its inputs from one vector that each step fills by one copy (layouts.py), and there are two kinds:
decode steps, of single rows, and steps with prompt chunks. More rows run kernel by kernel.

Graphs of one variant hold nothing of the layers it drops. They are recorded at their first use,
those of `warm_up` at start, and share one pool of memory: only one runs at a time, and what it
leaves is in `last_tokens` and `logits`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pruning.attention import Attend
from pruning.sublayers import last_rows
from pruning.variants import Variants
from server.engine.attention.paged import GroupStep, PagedBackend
from server.engine.batch import Batch
from server.engine.layouts import Chunks, Layout, Shape, SingleRows, rows_by_variant
from server.engine.runner import RecordedStep, known_tokens
from server.engine.sampling import most_likely
from server.engine.transfer import upload

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 64, 128, 192, 256, 384, 512)
"""Numbers of rows that decode graphs of one variant alone are made for. Between 32 and 128 those
that fill a box of the copy engine (multiprocessor.py): they take less time than fewer do."""
MIXED_SIZES = (4, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Those of each variant where several are in a step: fewer, since their combinations count. Rows of
padding cost little beside the weights."""
CHUNK_SIZES = (64, 256, 512, 768, 1024, 1536, 2048)
"""Those of one variant alone where there are prompt chunks: whole prompts of usual lengths, and not
much padding. Steps beyond the last take a device longer than the launches take the host."""
MOST_MIXED_CHUNK_ROWS = 512
"""The largest of them that is recorded where several variants are in such a step."""
MOST_GRAPHS = 256
"""Graphs kept; a combination of rows beyond them is run kernel by kernel."""

TABLE_ENTRIES = 1 << 22
"""Page ids that a step's block tables may hold together, a shared page once for each of its users:
16 MiB on the device."""


def chunk_sizes_for(tokens_per_step: int) -> tuple[int, ...]:
    """Return the sizes that steps of so many tokens need."""
    needed = sum(size < tokens_per_step for size in CHUNK_SIZES) + 1
    return CHUNK_SIZES[:needed]


@dataclass(frozen=True, slots=True)
class Recording:
    """What a graph is made for."""

    shape: Shape
    chunks: bool
    """Whether there may be prompt chunks."""


class StepGraphs:
    """The recorded steps of one model."""

    def __init__(
        self,
        model: nn.Module,
        attend: Attend,
        backend: PagedBackend,
        variants: Variants,
        *,
        most_rows: int,
        vocabulary: int,
        context: int,
        chunk_sizes: Sequence[int],
    ) -> None:
        """`attend` is what the model is given, over `backend`; most_rows is how many requests may
        run, chunk_sizes the rows of one variant that steps with chunks are recorded for."""
        self._model = model
        self._attend = attend
        self._backend = backend
        self._variants = variants
        self._context = context
        self.chunk_sizes = chunk_sizes
        weight = next(model.parameters())
        device = weight.device
        self._chunk_layouts: dict[Shape, Chunks] = {}  # making one takes longer than asking it
        self._largest = next((s for s in MIXED_SIZES if s >= most_rows), MIXED_SIZES[-1])
        places = len(variants) * self._largest
        self.last_tokens = torch.zeros(max(places, most_rows), dtype=torch.long, device=device)
        self.logits = torch.zeros(places, vocabulary, dtype=weight.dtype, device=device)
        largest = [
            Recording((self._largest,) * len(variants), chunks=False),
            Recording((CHUNK_SIZES[-1],) * len(variants), chunks=True),
        ]
        size = max(self._layout(recording).size for recording in largest) + TABLE_ENTRIES
        self._inputs = torch.zeros(size, dtype=torch.int32, device=device)
        self._recorder = _Recorder(device)
        # A handful of small kernels, if it is not compiled.
        compiles = device.type == "cuda"
        self._known = torch.compile(known_tokens, dynamic=True) if compiles else known_tokens
        self._recorded: dict[Recording, _Recorded] = {}

    @torch.inference_mode()
    def warm_up(self, most_rows: int) -> None:
        """Record steps of one variant alone and of each two: decode steps of up to `most_rows` rows
        each, and steps with chunks."""
        started = time.monotonic()
        decode = [size for size in SIZES if size <= min(most_rows, self._largest)]
        mixed = [size for size in MIXED_SIZES if size in decode]
        recordings = [
            Recording(shape, chunks)
            for alone, together, chunks in (
                (decode, mixed, False),
                (self.chunk_sizes, self._mixed_chunk_sizes, True),
            )
            for shape in _usual_shapes(self._variants, alone, together)
        ]
        # The largest first: smaller ones find room in the memory it took.
        for recording in sorted(recordings, key=lambda each: sum(each.shape), reverse=True):
            self._recorded[recording] = self._record(recording)
        logger.info("recorded %d graphs in %.1f s", len(recordings), time.monotonic() - started)

    def prepare(self, batch: Batch, sources: NDArray[np.int64]) -> RecordedStep | None:
        """Bring a batch's inputs to the device; see the runner's protocol."""
        recording = self._recording(batch)
        if recording is None:
            return None
        if (recorded := self._recorded.get(recording)) is None:
            if len(self._recorded) >= MOST_GRAPHS:  # many variants have more from the start
                return None
            recorded = self._recorded[recording] = self._record(recording)
        filled = recorded.layout.fill(batch, sources)
        self._inputs[: len(filled)].copy_(upload(filled, torch.int32, self._inputs.device))
        return RecordedStep(recorded.run, recorded.layout.places(batch))

    def _recording(self, batch: Batch) -> Recording | None:
        """Return what a batch can be computed by, None if it has to run kernel by kernel."""
        if batch.scored or sum(len(group.pages) for group in batch.groups) > TABLE_ENTRIES:
            return None
        is_mixed = sum(count > 0 for count in batch.variant_sequences) > 1
        if len(batch.token_ids) > len(batch.sequences):
            sizes = self._mixed_chunk_sizes if is_mixed else self.chunk_sizes
            return self._chunk_recording(batch, sizes)
        if max(batch.variant_sequences) > self._largest:
            return None
        shape = _padded(batch.variant_sequences, MIXED_SIZES if is_mixed else SIZES)
        return None if shape is None else Recording(shape, chunks=False)

    def _chunk_recording(self, batch: Batch, sizes: Sequence[int]) -> Recording | None:
        """Return the least of these sizes that has room for the batch's rows and for its tiles, as
        many short prompts have more of them than rows."""
        rows = rows_by_variant(batch)
        for least in range(len(sizes)):
            if (shape := _padded(rows, sizes[least:])) is None:
                break
            if self._chunks(shape).holds(batch):
                return Recording(shape, chunks=True)
        return None

    @property
    def _mixed_chunk_sizes(self) -> list[int]:
        return [size for size in self.chunk_sizes if size <= MOST_MIXED_CHUNK_ROWS]

    def _layout(self, recording: Recording) -> Layout:
        if recording.chunks:
            return self._chunks(recording.shape)
        return SingleRows(recording.shape, self._variants)

    def _chunks(self, shape: Shape) -> Chunks:
        if (layout := self._chunk_layouts.get(shape)) is None:
            tiling = self._backend.tiling(sum(shape))
            layout = Chunks(shape, self._variants, self._largest, tiling)
            self._chunk_layouts[shape] = layout
        return layout

    def _record(self, recording: Recording) -> _Recorded:
        layout = self._layout(recording)
        bound = layout.bind(self._inputs, self._context)
        padding = layout.padding()
        self._inputs[: len(padding)].copy_(upload(padding, torch.int32, self._inputs.device))
        kept = self.last_tokens.clone()  # a step in flight may have left them for the next one

        def step() -> None:
            self._backend.bind(bound)
            sources = layout.sources(self._inputs)
            ids = self._known(layout.token_ids(self._inputs), sources, self.last_tokens)
            positions = layout.positions(self._inputs)
            rows = layout.logit_rows(self._inputs)
            rows = None if rows is None else rows.long()
            last = last_rows(layout.attending_rows, layout.mlp_rows, len(positions), rows)
            output = self._model(
                ids[None],
                position_ids=positions[None].long(),
                attend=self._attend,
                attending_rows=layout.attending_rows,
                mlp_rows=layout.mlp_rows,
                last=last,
                logits_to_keep=0 if rows is None or last is not None else rows,  # 0: all
            )
            logits = output.logits[0]
            self.logits[: len(logits)].copy_(logits)
            self.last_tokens[: len(logits)].copy_(most_likely(logits))

        recorded = _Recorded(layout, bound, self._recorder.record(step))
        self.last_tokens.copy_(kept)
        return recorded


@dataclass(frozen=True, slots=True)
class _Recorded:
    layout: Layout
    bound: list[GroupStep | None]
    """The graph reads these as long as it lives."""
    run: Callable[[], None]


class _Recorder:
    """Records functions that launch kernels; on a CPU they are simply called."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        if self._pool is None:
            return step
        step()  # compiles what is not compiled yet
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


def _padded(counts: Sequence[int], sizes: Sequence[int]) -> Shape | None:
    """Return each count's size, the least that holds it; None if there is none for one of them."""
    if not sizes or max(counts) > sizes[-1]:
        return None
    return tuple(next(size for size in (0, *sizes) if size >= count) for count in counts)


def _usual_shapes(
    variants: Variants, alone: Sequence[int], together: Sequence[int]
) -> Iterator[Shape]:
    """Yield the shapes of one variant alone and of each two that can be in one batch, of rows of
    these sizes."""
    chains = [variants.chain_of[variant.name] for variant in variants]
    for first, chain in enumerate(chains):
        for size in alone:
            yield tuple(size if i == first else 0 for i in range(len(chains)))
        for second in (i for i in range(first) if chains[i] == chain):
            for sizes in product(together, repeat=2):
                rows = {first: sizes[0], second: sizes[1]}
                yield tuple(rows.get(i, 0) for i in range(len(chains)))
