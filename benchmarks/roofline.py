"""The roofline: what the device can do, what a step must do, and so the least time it can take.

Ceilings are measured in the same run as what is held against them: bytes a second of a copy and of
the best plain read, operations a second of a big matrix product. The bytes and operations of a
step are counted from the model's config: every weight matrix that some row needs is read once, keys
and values are read once and written once, activations cost nothing. So it is a floor that no
engine reaches, and that holds for any engine.

Knows nothing of engines. The formulas are for the Llama family: q, k, v, o and gate, up, down.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional
from transformers import LlamaConfig

from pruning.families import kv_shape

_WARM_UP = 3
_GIB = 1 << 30
_CACHED_BYTES = 250 << 20


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reached in this run."""

    copy_bytes_per_second: float
    """Bytes read and bytes written by a device-to-device copy, over its time."""
    read_bytes_per_second: float
    """Bytes read by a sum or by a matrix-vector product, whichever is faster, over its time."""
    operations_per_second: float
    """Multiplications and additions of a big square matrix product, over its time."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some sequences of one variant in a step, all alike."""

    sequences: int
    tokens: int
    """Rows of each: 1 when decoding, the prompt when prefilling."""
    context: float
    """Tokens of each whose keys and values are there already."""
    attention_layers: int
    """They attend in the first so many layers."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters the parts of a model have, and how many of those are in matrices."""

    attention: int
    """One attention sublayer, its norm included."""
    mlp: int
    """One MLP sublayer, its norm included."""
    head: int
    """LM head and final norm."""
    attention_matrices: int
    mlp_matrices: int
    head_matrix: int
    embedding_row: int


@dataclass(frozen=True, slots=True)
class Floor:
    """What a step must move and compute."""

    bytes: float
    operations: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the least seconds by the copy bandwidth and the matrix rate."""
        return self._seconds(ceilings.copy_bytes_per_second, ceilings)

    def seconds_by_read(self, ceilings: Ceilings) -> float:
        """Return the least seconds by the read bandwidth, the stricter figure."""
        return self._seconds(ceilings.read_bytes_per_second, ceilings)

    def _seconds(self, bandwidth: float, ceilings: Ceilings) -> float:
        return max(self.bytes / bandwidth, self.operations / ceilings.operations_per_second)


def parameters(config: LlamaConfig) -> Parameters:
    """Return the parameter counts of a Llama config without biases."""
    shape, width = kv_shape(config), config.hidden_size
    queries = config.num_attention_heads * shape.head_dim
    attention = 2 * width * queries + 2 * width * shape.kv_heads * shape.head_dim
    mlp = 3 * width * config.intermediate_size
    head = width * config.vocab_size
    return Parameters(
        attention=attention + width,
        mlp=mlp + width,
        head=head + width,
        attention_matrices=attention,
        mlp_matrices=mlp,
        head_matrix=head,
        embedding_row=width,
    )


def floor(
    config: LlamaConfig,
    element_bytes: int,
    work: Sequence[Rows],
    kv_element_bytes: int | None = None,
) -> Floor:
    """Return the bytes and operations of one step, or of a prefill counted as one step."""
    moved = step_bytes(config, element_bytes, work, kv_element_bytes)
    return Floor(moved, step_operations(config, work))


def step_bytes(
    config: LlamaConfig,
    element_bytes: int,
    work: Sequence[Rows],
    kv_element_bytes: int | None = None,
) -> float:
    """Return the bytes of weights read, keys and values read, keys and values written.

    An element of a weight has element_bytes, and so has one of a key or value unless
    kv_element_bytes says else.
    A layer's attention weights count if any row attends there; layers nest, so those are as many
    as the rows that keep the most attend in. Of the embedding only the rows' own entries count.
    """
    counts, shape = parameters(config), kv_shape(config)
    attending = max((rows.attention_layers for rows in work if rows.sequences), default=0)
    weights = (
        shape.layers * counts.mlp
        + attending * counts.attention
        + counts.head
        + _all_rows(work) * counts.embedding_row
    )
    kv_tokens = sum(
        rows.sequences * rows.attention_layers * (rows.context + rows.tokens) for rows in work
    )
    return weights * element_bytes + kv_tokens * shape.bytes_per_token(
        kv_element_bytes or element_bytes
    )


def step_operations(config: LlamaConfig, work: Sequence[Rows]) -> float:
    """Return two operations a matrix parameter and row, and attention's two products.

    The LM head counts for the last row of each sequence, the only one that is sampled from, and so
    do the MLPs from the last layer on in which a sequence attends.
    """
    counts, shape = parameters(config), kv_shape(config)
    per_score = 4 * config.num_attention_heads * shape.head_dim
    sampled = sum(rows.sequences for rows in work)
    operations = 2.0 * counts.head_matrix * sampled
    for rows in work:
        whole = max(rows.attention_layers - 1, 0)
        mlps = rows.tokens * whole + shape.layers - whole
        operations += 2.0 * counts.mlp_matrices * rows.sequences * mlps
        pairs = rows.tokens * rows.context + rows.tokens * (rows.tokens + 1) / 2
        in_layer = 2.0 * counts.attention_matrices * rows.tokens + per_score * pairs
        operations += rows.sequences * rows.attention_layers * in_layer
    return operations


def _all_rows(work: Sequence[Rows]) -> int:
    return sum(rows.sequences * rows.tokens for rows in work)


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 20) -> Ceilings:
    """Measure the device, each figure a median. Needs up to 4 GiB of free device memory."""
    size = _GIB if device.type == "cuda" else _GIB // 8
    ceilings = Ceilings(
        copy_bytes_per_second=_copy_rate(size, device, repeats),
        read_bytes_per_second=max(
            _sum_rate(size, dtype, device, repeats),
            _matrix_vector_rate(size, dtype, device, repeats),
        ),
        operations_per_second=_matrix_rate(dtype, device, repeats),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ceilings


def _copy_rate(size: int, device: torch.device, repeats: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device, repeats)


def _sum_rate(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    values = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
    return size / _median_seconds(lambda: values.sum(), device, repeats)


def _matrix_vector_rate(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    width = 8192
    weight = torch.ones(size // dtype.itemsize // width, width, dtype=dtype, device=device)
    row = torch.ones(1, width, dtype=dtype, device=device)
    return size / _median_seconds(lambda: functional.linear(row, weight), device, repeats)


def _matrix_rate(dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """Random values: products of constants draw less power, and so run faster than real ones."""
    width = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    return 2 * width**3 / _median_seconds(lambda: left @ right, device, repeats)


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of `work`, by the device's own clock where it has one."""
    for _ in range(_WARM_UP):
        work()
    if device.type == "cuda":
        return statistics.median(_cuda_seconds(work, device, repeats))
    return statistics.median(_seconds(work) for _ in range(repeats))


def graph_seconds(work: Callable[[int], object], count: int, repeats: int = 20) -> float:
    """Return the median seconds of one of `work(0)`, `work(1)` ..., in a CUDA graph of `count`."""
    work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            work(index)
    return _median_seconds(graph.replay, torch.device("cuda"), repeats) / count


def copies_beyond_cache(size: int) -> int:
    """Return how many tensors of so many bytes do not fit any device's cache together; not 1."""
    return max(2, -(-_CACHED_BYTES // size))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Queue everything before waiting, so that no launch shows between two events."""
    with torch.cuda.device(device):
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(repeats + 1)
        ]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        events[-1].synchronize()
    return [float(before.elapsed_time(after)) / 1e3 for before, after in pairwise(events)]
