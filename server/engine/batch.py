"""A step's work as arrays, in the row order that makes every layer's attending rows a prefix.

    sequences   full A (3 tokens)   full B (1)   pruned C (2)     most attention first
    rows        a0  a1  a2          b0           c0  c1
    layer kept by both              all 6 rows attend
    layer dropped by pruned         the first 4 attend

numpy only: the runner moves the arrays to its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pruning.variants import Variants
from server.engine.pages import PageLayout
from server.engine.request import SamplingParams
from server.engine.scheduler import Scheduled

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupRows:
    """The rows that attend in one layer group: a prefix of the batch."""

    sequences: int
    rows: int
    block_table: Ints
    """[sequences, pages] page ids, padded with 0."""
    slots: Ints
    """[rows] where each row's key and value go: page id x tokens per page + place in the page."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler must know of one row of logits."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row of logits that scores the prompt token after it."""

    sequence: int
    token: int
    alternatives: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. Every sequence is one request's share of the step."""

    sequences: tuple[Scheduled, ...]
    token_ids: Ints
    """[rows]"""
    positions: Ints
    """[rows]"""
    query_starts: Ints
    """[sequences + 1] first row of each sequence."""
    lengths: Ints
    """[sequences] tokens with keys and values after this step."""
    attending_rows: tuple[int, ...]
    """Per layer."""
    groups: tuple[GroupRows, ...]
    logit_rows: Ints
    """Rows that need logits: first one for each of `sampled`, then one for each of `scored`."""
    sampled: tuple[int, ...]
    """Sequences that get a new token."""
    sampling: tuple[SamplingRow, ...]
    """One for each of `sampled`."""
    scored: tuple[ScoredRow, ...]


def build_batch(step: Sequence[Scheduled], variants: Variants, layout: PageLayout) -> Batch:
    """Lay out a step. `step` must not be empty."""
    sequences = tuple(sorted(step, key=lambda s: variants.order(s.request.variant)))
    counts = np.array([s.count for s in sequences], dtype=np.int64)
    starts = np.array([s.start for s in sequences], dtype=np.int64)
    query_starts = np.concatenate([[0], np.cumsum(counts)])
    owner = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(len(owner)) - query_starts[owner] + starts[owner]
    token_ids = [t for s in sequences for t in s.request.tokens(s.start, s.start + s.count)]
    groups = tuple(
        _group_rows(index, sequences, variants, layout, owner, positions)
        for index in range(len(variants.groups))
    )
    sampled = tuple(
        i for i, s in enumerate(sequences) if s.completes and s.request.params.max_tokens > 0
    )
    score_rows, scored = _scored_rows(sequences, query_starts)
    return Batch(
        sequences=sequences,
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=positions,
        query_starts=query_starts,
        lengths=starts + counts,
        attending_rows=_attending_rows(variants, groups),
        groups=groups,
        logit_rows=np.array([query_starts[i + 1] - 1 for i in sampled] + score_rows, np.int64),
        sampled=sampled,
        sampling=tuple(_sampling_row(sequences[i]) for i in sampled),
        scored=scored,
    )


def _group_rows(
    index: int,
    sequences: Sequence[Scheduled],
    variants: Variants,
    layout: PageLayout,
    owner: Ints,
    positions: Ints,
) -> GroupRows:
    who = variants.groups[index].variants
    attending = [s.request for s in sequences if s.request.variant in who]
    tables = [request.pages[index] for request in attending]
    block_table = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int64)
    for row, table in enumerate(tables):
        block_table[row, : len(table)] = table
    rows = int(np.searchsorted(owner, len(attending)))
    tokens = layout.tokens_per_page[index]
    pages = block_table[owner[:rows], positions[:rows] // tokens]
    return GroupRows(len(attending), rows, block_table, pages * tokens + positions[:rows] % tokens)


def _attending_rows(variants: Variants, groups: Sequence[GroupRows]) -> tuple[int, ...]:
    rows = [0] * variants.layers
    for group, batch in zip(variants.groups, groups, strict=True):
        for layer in group.layers:
            rows[layer] = batch.rows
    return tuple(rows)


def _scored_rows(
    sequences: Sequence[Scheduled], query_starts: Ints
) -> tuple[list[int], tuple[ScoredRow, ...]]:
    """Return the rows whose logits score a prompt token that was not reported yet."""
    rows: list[int] = []
    scored: list[ScoredRow] = []
    for index, (request, start, count) in enumerate(
        (s.request, s.start, s.count) for s in sequences
    ):
        if not request.scores_prompt:
            continue
        first = max(start, request.num_scored_tokens)
        last = min(start + count, len(request.prompt) - 1)
        for position in range(first, last):
            rows.append(int(query_starts[index]) + position - start)
            token = request.prompt[position + 1]
            scored.append(ScoredRow(index, token, request.params.prompt_logprobs or 0))
    return rows, tuple(scored)


def _sampling_row(scheduled: Scheduled) -> SamplingRow:
    request = scheduled.request
    return SamplingRow(request.params, request.prompt, request.output)
