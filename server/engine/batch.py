"""A step's work as arrays, in the row order that makes every layer's attending rows a prefix.

    sequences   full A (3 tokens)   full B (1)   pruned C (2)     most attention first
    rows        a0  a1  a2          b0           c0  c1
    layer kept by both              all 6 rows attend
    layer dropped by pruned         the first 4 attend

numpy only: the runner moves the arrays to its device.
"""

from __future__ import annotations

from collections import Counter
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
    pages: NDArray[np.int32]
    """The sequences' block tables one after the other: page ids."""
    table_starts: Ints
    """[sequences + 1] where each sequence's block table starts in `pages`."""
    slots: Ints
    """[rows] where each row's key and value go: page id x tokens per page + place in the page."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler must know of one row of logits."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    generated: int
    """Tokens before this one, the pending one, which `output` lacks, included."""


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
    sources: Ints
    """[rows] where the token is still on the device: its place among those that the step in
    flight samples; else -1."""
    positions: Ints
    """[rows]"""
    query_starts: Ints
    """[sequences + 1] first row of each sequence."""
    variant_sequences: tuple[int, ...]
    """How many sequences each variant has, in the variants' order."""
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
    sources = np.full(len(owner), -1, dtype=np.int64)
    for row, s in zip(query_starts[1:] - 1, sequences, strict=True):
        if s.request.pending is not None and s.samples:
            sources[row] = s.request.pending
    groups = tuple(
        _group_rows(index, sequences, variants, layout, owner, positions)
        for index in range(len(variants.groups))
    )
    sampled = tuple(i for i, s in enumerate(sequences) if s.samples)
    score_rows, scored = _scored_rows(sequences, query_starts)
    return Batch(
        sequences=sequences,
        token_ids=np.array(token_ids, dtype=np.int64),
        sources=sources,
        positions=positions,
        query_starts=query_starts,
        variant_sequences=_variant_sequences(sequences, variants),
        lengths=starts + counts,
        attending_rows=_attending_rows(variants, groups),
        groups=groups,
        logit_rows=np.array([query_starts[i + 1] - 1 for i in sampled] + score_rows, np.int64),
        sampled=sampled,
        sampling=tuple(_sampling_row(sequences[i]) for i in sampled),
        scored=scored,
    )


def _variant_sequences(sequences: Sequence[Scheduled], variants: Variants) -> tuple[int, ...]:
    counts = Counter(s.request.variant for s in sequences)
    return tuple(counts[variant.name] for variant in variants)


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
    pages = np.frombuffer(b"".join(tables), dtype=np.int32)
    table_starts = np.cumsum([0, *map(len, tables)])
    rows = int(np.searchsorted(owner, len(attending)))
    tokens = layout.tokens_per_page[index]
    places = positions[:rows]
    page = pages[table_starts[owner[:rows]] + places // tokens].astype(np.int64)
    return GroupRows(len(attending), rows, pages, table_starts, page * tokens + places % tokens)


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
    return SamplingRow(request.params, request.prompt, request.output, request.num_generated)
