"""Decode steps recorded once as CUDA graphs, one for each padded number of rows per variant.

A step of single rows is a few hundred kernels of some microseconds each; launching them one by one
takes longer than running them. A graph launches all of them at once. It reads its inputs from one
vector that each step fills by one copy::

    rows      [ full full full - | pruned pruned ]      padded to (4, 2); "-" attends nothing
    inputs    [ token ids | sources | positions | lengths | slots, table starts per group | pages ]

Graphs of one variant hold nothing of the layers it drops. They are recorded at their first use,
those of `warm_up` at start, and share one pool of memory: only one runs at a time, and what it
leaves is in `last_tokens` and `logits`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruning.attention import Attend
from pruning.variants import Variants
from server.engine.attention.paged import GroupStep, PagedBackend, Singles
from server.engine.batch import Batch, attending_by_group, by_layer, mlp_rows
from server.engine.runner import known_tokens
from server.engine.sampling import most_likely
from server.engine.transfer import aligned_starts, upload

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows that graphs of one variant alone are made for."""
MIXED_SIZES = (4, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Those of each variant where several are in a step: fewer, since their combinations count. Rows of
padding cost little beside the weights."""
MOST_GRAPHS = 256
"""Graphs kept; a combination of rows beyond them is run kernel by kernel."""

TABLE_ENTRIES = 1 << 22
"""Page ids that a step's block tables may hold together, a shared page once for each of its users:
16 MiB on the device."""

Shape = tuple[int, ...]
"""Padded rows of each variant."""


class DecodeGraphs:
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
    ) -> None:
        """`attend` is what the model is given, over `backend`."""
        self._model = model
        self._attend = attend
        self._backend = backend
        self._variants = variants
        self._context = context
        weight = next(model.parameters())
        device = weight.device
        self._largest = next((s for s in MIXED_SIZES if s >= most_rows), MIXED_SIZES[-1])
        places = len(variants) * self._largest
        self.last_tokens = torch.zeros(max(places, most_rows), dtype=torch.long, device=device)
        self.logits = torch.zeros(places, vocabulary, dtype=weight.dtype, device=device)
        vectors = 4 + 2 * len(variants.groups)
        size = vectors * (places + 4) + TABLE_ENTRIES
        self._inputs = torch.zeros(size, dtype=torch.int32, device=device)
        self._recorder = _Recorder(device)
        # A handful of small kernels, if it is not compiled.
        compiles = device.type == "cuda"
        self._known = torch.compile(known_tokens, dynamic=True) if compiles else known_tokens
        self._recorded: dict[Shape, _Recorded] = {}

    @torch.inference_mode()
    def warm_up(self, most_rows: int) -> None:
        """Record steps of one variant alone and of each two, of up to `most_rows` rows each."""
        started = time.monotonic()
        shapes = _usual_shapes(self._variants, min(most_rows, self._largest))
        # The largest first: smaller ones find room in the memory it took.
        for shape in sorted(shapes, key=sum, reverse=True):
            self._recorded[shape] = self._record(shape)
        logger.info(
            "recorded %d decode graphs in %.1f s", len(self._recorded), time.monotonic() - started
        )

    def replay(self, batch: Batch, sources: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Compute a batch; see the runner's protocol."""
        shape = self._shape(batch)
        if shape is None:
            return None
        if (recorded := self._recorded.get(shape)) is None:
            if len(self._recorded) == MOST_GRAPHS:
                return None
            recorded = self._recorded[shape] = self._record(shape)
        rows = recorded.layout.rows(batch.variant_sequences)
        filled = recorded.layout.fill(batch, sources, rows)
        self._inputs[: len(filled)].copy_(upload(filled, torch.int32, self._inputs.device))
        recorded.run()
        return rows

    def _shape(self, batch: Batch) -> Shape | None:
        """Return the padded rows of a batch of single rows, None for any other batch."""
        if len(batch.token_ids) > len(batch.sequences) or batch.scored:
            return None
        if max(batch.variant_sequences) > self._largest:
            return None
        if sum(len(group.pages) for group in batch.groups) > TABLE_ENTRIES:
            return None
        is_mixed = sum(count > 0 for count in batch.variant_sequences) > 1
        sizes = MIXED_SIZES if is_mixed else SIZES
        return tuple(
            next(size for size in (0, *sizes) if size >= count) for count in batch.variant_sequences
        )

    def _record(self, shape: Shape) -> _Recorded:
        layout = InputLayout(shape, self._variants)
        bound = layout.bind(self._inputs, self._context)
        padding = layout.padding()
        self._inputs[: len(padding)].copy_(upload(padding, torch.int32, self._inputs.device))
        kept = self.last_tokens.clone()  # a step in flight may have left them for the next one

        def step() -> None:
            self._backend.bind(bound)
            inputs = layout.vectors(self._inputs)
            ids = self._known(inputs.token_ids, inputs.sources, self.last_tokens)
            output = self._model(
                ids[None],
                position_ids=inputs.positions[None].long(),
                attend=self._attend,
                attending_rows=layout.attending_rows,
                mlp_rows=layout.mlp_rows,
            )
            logits = output.logits[0]
            self.logits[: len(logits)].copy_(logits)
            self.last_tokens[: len(logits)].copy_(most_likely(logits))

        recorded = _Recorded(layout, bound, self._recorder.record(step))
        self.last_tokens.copy_(kept)
        return recorded


@dataclass(frozen=True, slots=True)
class _Recorded:
    layout: InputLayout
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


@dataclass(frozen=True, slots=True)
class Vectors:
    """One entry per padded row, on the device."""

    token_ids: Tensor
    sources: Tensor
    positions: Tensor
    lengths: Tensor


class InputLayout:
    """Where each vector lies in the inputs of one shape."""

    def __init__(self, shape: Shape, variants: Variants) -> None:
        self._first_rows = [0, *accumulate(shape)]
        self._group_rows = attending_by_group(variants, shape)
        self.attending_rows = list(by_layer(variants, self._group_rows))
        self.mlp_rows = mlp_rows(variants, shape)
        self._sizes = [sum(shape)] * 4 + [rows for rows in self._group_rows for _ in range(2)]
        self._starts = aligned_starts(self._sizes)

    def rows(self, counts: Sequence[int]) -> NDArray[np.int64]:
        """Return the padded row of each sequence; counts are those of each variant."""
        parts = [
            np.arange(first, first + count)
            for first, count in zip(self._first_rows, counts, strict=False)
        ]
        return np.concatenate(parts)

    def padding(self) -> NDArray[np.int32]:
        """Return inputs of which every row is padding: it attends and writes nothing."""
        filled = np.zeros(self._starts[-1], dtype=np.int32)
        self._vector(filled, 1)[:] = -1
        for index in range(len(self._group_rows)):
            self._vector(filled, 4 + 2 * index)[:] = -1
        return filled

    def fill(
        self, batch: Batch, sources: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """Return the inputs for a batch whose sequences stand in these rows."""
        filled = self.padding()
        for place, values in enumerate((batch.token_ids, sources, batch.positions, batch.lengths)):
            self._vector(filled, place)[rows] = values
        tables = self._starts[-1]
        for index, group in enumerate(batch.groups):
            attending = rows[: group.rows]
            self._vector(filled, 4 + 2 * index)[attending] = group.slots
            self._vector(filled, 5 + 2 * index)[attending] = tables + group.table_starts[:-1]
            tables += len(group.pages)
        return np.concatenate([filled, *(group.pages for group in batch.groups)])

    def vectors(self, inputs: Tensor) -> Vectors:
        return Vectors(*(self._view(inputs, place) for place in range(4)))

    def bind(self, inputs: Tensor, longest: int) -> list[GroupStep | None]:
        """Return views of the inputs for the attention, per layer group."""
        lengths = self.vectors(inputs).lengths
        return [
            GroupStep(
                slots=self._view(inputs, 4 + 2 * index),
                pages=inputs,
                singles=Singles(
                    table_starts=self._view(inputs, 5 + 2 * index),
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

    def _vector(self, filled: NDArray[np.int32], place: int) -> NDArray[np.int32]:
        start = self._starts[place]
        return filled[start : start + self._sizes[place]]

    def _view(self, inputs: Tensor, place: int) -> Tensor:
        start = self._starts[place]
        return inputs[start : start + self._sizes[place]]


def _usual_shapes(variants: Variants, most_rows: int) -> Iterator[Shape]:
    """Yield the shapes of one variant alone and of each two that can be in one batch."""
    chains = [variants.chain_of[variant.name] for variant in variants]
    for first, chain in enumerate(chains):
        for size in SIZES:
            if size <= most_rows:
                yield tuple(size if i == first else 0 for i in range(len(chains)))
        for second in (i for i in range(first) if chains[i] == chain):
            for sizes in product([size for size in MIXED_SIZES if size <= most_rows], repeat=2):
                rows = {first: sizes[0], second: sizes[1]}
                yield tuple(rows.get(i, 0) for i in range(len(chains)))
