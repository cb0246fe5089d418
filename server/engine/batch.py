"""A step's work as arrays, in the row order that makes every layer's attending rows a prefix.

    sequences   full A (3 tokens)   full B (1)   pruned C (2)     most attention first
    rows        a0  a1  a2          b0           c0  c1
    layer kept by both              all 6 rows attend
    layer dropped by pruned         the first 4 attend

numpy only: the runner moves the arrays to its device. What stays the same while the same requests
decode is remembered: after a model has swept the caches, each line here takes several times as long
as it seems.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pruning.variants import Variants
from server.engine.pages import PageLayout
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import Scheduled

Ints = NDArray[np.int64]

_REMEMBERED = 1024
"""Compositions of steps whose counts are remembered."""


@dataclass(slots=True)
class GroupRows:
    """The rows that attend in one layer group: a prefix of the batch. Changed as a `Batch`; not
    frozen, because frozen ones take four times as long to make."""

    sequences: int
    rows: int
    pages: NDArray[np.int32]
    """The sequences' block tables one after the other: page ids."""
    table_starts: Ints
    """[sequences + 1] where each sequence's block table starts in `pages`."""
    slots: Ints
    """[rows] where each row's key and value go: page id x tokens per page + place in the page."""


@dataclass(slots=True)
class SamplingRow:
    """What the sampler must know of one row of logits. Never changed."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    pending: int
    """How many tokens before this one `output` lacks: 1 while the last one is not known, else 0."""

    @property
    def generated(self) -> int:
        """Tokens before this one."""
        return len(self.output) + self.pending


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row of logits that scores the prompt token after it."""

    sequence: int
    token: int
    alternatives: int


@dataclass(slots=True)
class Batch:
    """One forward pass. Every sequence is one request's share of the step. Changed by `Batches`
    alone, between steps that repeat each other."""

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
    mlp_rows: tuple[int, ...] | None
    """Per layer, how many leading rows go through its MLP; None where no variant drops any."""
    groups: tuple[GroupRows, ...]
    logit_rows: Ints
    """Rows that need logits: first one for each of `sampled`, then one for each of `scored`."""
    sampled: tuple[int, ...]
    """Sequences that get a new token."""
    sampling: tuple[SamplingRow, ...]
    """One for each of `sampled`."""
    scored: tuple[ScoredRow, ...]


class Batches:
    """The batches of consecutive steps.

    A step that repeats the one before, which the scheduler says by the same tuple, has the same
    batch, whose numbers are counted on where they are; only block tables that have changed are made
    anew. The step before must be over by then.
    """

    def __init__(self, variants: Variants, layout: PageLayout) -> None:
        self._variants = variants
        self._layout = layout
        self._step: Sequence[Scheduled] = ()
        self._batch: Batch | None = None

    def of(self, step: Sequence[Scheduled]) -> Batch:
        """Lay out a step of one chain. `step` must not be empty."""
        if self._batch is None or step is not self._step:
            self._batch = build_batch(step, self._variants, self._layout)
            self._step = step
        else:
            _count_on(self._batch, self._layout)
        return self._batch


def _count_on(batch: Batch, layout: PageLayout) -> None:
    """Move a batch of single rows a token further. The sums are Python's: numpy's first one after a
    model has swept the caches takes as long as all of this."""
    sequences = batch.sequences
    batch.token_ids[:] = [s.request.last_token for s in sequences]
    batch.positions[:] = [s.start for s in sequences]
    batch.lengths[:] = [s.start + 1 for s in sequences]
    for index, group in enumerate(batch.groups):
        attending, tokens = sequences[: group.sequences], layout.tokens_per_page[index]
        tables = [s.request.pages[index] for s in attending]
        group.slots[:] = _slots_of_singles(tables, attending, tokens)
        if (pages := b"".join(tables)) != group.pages.tobytes():
            group.pages, group.table_starts = _joined(pages, tables)


def build_batch(step: Sequence[Scheduled], variants: Variants, layout: PageLayout) -> Batch:
    """Lay out a step of one chain. `step` must not be empty."""
    by_variant: dict[str, list[Scheduled]] = {variant.name: [] for variant in variants}
    for s in step:
        by_variant[s.request.variant].append(s)
    sequences = tuple(chain.from_iterable(by_variant.values()))
    variant_sequences = tuple(map(len, by_variant.values()))
    rows = _Rows.of(sequences)
    groups = tuple(
        _group_rows(index, sequences[:attending], layout, rows)
        for index, attending in enumerate(attending_by_group(variants, variant_sequences))
    )
    sampled = tuple(i for i, s in enumerate(sequences) if s.samples)
    score_rows, scored = _scored_rows(sequences, rows.query_starts)
    return Batch(
        sequences=sequences,
        token_ids=np.array(_token_ids(sequences), dtype=np.int64),
        sources=_sources(sequences, rows),
        positions=rows.positions,
        query_starts=rows.query_starts,
        variant_sequences=variant_sequences,
        lengths=rows.lengths,
        attending_rows=by_layer(variants, tuple([group.rows for group in groups])),
        mlp_rows=mlp_rows(variants, _row_counts(by_variant, variant_sequences, rows)),
        groups=groups,
        logit_rows=_logit_rows(rows.last, sampled, score_rows),
        sampled=sampled,
        sampling=tuple(_sampling_rows(s.request for s in sequences if s.samples)),
        scored=scored,
    )


class _Rows(NamedTuple):
    """Which rows the sequences of a step have. numpy takes longer to be called than to compute so
    little, so where every sequence has one row, as in decoding, less is asked of it."""

    query_starts: Ints
    owner: Ints | None
    """[rows] the sequence of each; None: the one of its own number."""
    positions: Ints
    lengths: Ints
    last: Ints
    """[sequences] last row of each."""

    @classmethod
    def of(cls, sequences: Sequence[Scheduled]) -> _Rows:
        starts = np.array([s.start for s in sequences], dtype=np.int64)
        if all(s.count == 1 for s in sequences):
            query_starts = _first_numbers(len(sequences) + 1)
            return cls(query_starts, None, starts, starts + 1, query_starts[:-1])
        counts = np.array([s.count for s in sequences], dtype=np.int64)
        query_starts = np.concatenate([[0], np.cumsum(counts)])
        owner = np.repeat(np.arange(len(sequences)), counts)
        positions = np.arange(len(owner)) - query_starts[owner] + starts[owner]
        return cls(query_starts, owner, positions, starts + counts, query_starts[1:] - 1)


@lru_cache(_REMEMBERED)
def _first_numbers(count: int) -> Ints:
    """Return 0, 1, ..., which many steps share and none changes."""
    return np.arange(count)


def _row_counts(
    by_variant: Mapping[str, Sequence[Scheduled]], sequences: tuple[int, ...], rows: _Rows
) -> tuple[int, ...]:
    """Return how many rows each variant has, of so many sequences."""
    if rows.owner is None:
        return sequences
    return tuple(sum(s.count for s in own) for own in by_variant.values())


def _logit_rows(last: Ints, sampled: Sequence[int], scored: Sequence[int]) -> Ints:
    """Return the rows that sample, of the last ones of all sequences, and those that score."""
    rows = last if len(sampled) == len(last) else last[list(sampled)]
    return np.concatenate([rows, np.array(scored, np.int64)]) if scored else rows


def _token_ids(sequences: Sequence[Scheduled]) -> list[int]:
    """Return the tokens of all rows; 0 stands for those that are not known here."""
    found: list[int] = []
    for s in sequences:
        if s.samples and s.count == 1:
            found.append(s.request.last_token)
        else:
            found.extend(s.request.tokens(s.start, s.start + s.count))
    return found


def _sources(sequences: Sequence[Scheduled], rows: _Rows) -> Ints:
    """Return for each row the place of its token in the step in flight, or -1."""
    pending = np.array(
        [-1 if (p := s.request.pending) is None or not s.samples else p for s in sequences],
        dtype=np.int64,
    )
    if rows.owner is None:
        return pending
    sources = np.full(len(rows.owner), -1, dtype=np.int64)
    sources[rows.last] = pending
    return sources


@lru_cache(_REMEMBERED)
def attending_by_group(variants: Variants, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Return for each layer group how many attend, of so many sequences or rows of each variant of
    one chain: the first ones, as they nest."""
    return tuple(
        sum(
            count
            for variant, count in zip(variants, counts, strict=True)
            if variant.name in group.variants
        )
        for group in variants.groups
    )


@lru_cache(_REMEMBERED)
def mlp_rows(variants: Variants, rows: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return for each layer how many rows go through its MLP, of so many of each variant of one
    chain; None where no variant drops any."""
    if not variants.drop_mlps:
        return None
    return tuple(
        sum(
            count
            for variant, count in zip(variants, rows, strict=True)
            if layer not in variant.dropped_mlps
        )
        for layer in range(variants.layers)
    )


@lru_cache(_REMEMBERED)
def by_layer(variants: Variants, of_groups: tuple[int, ...]) -> tuple[int, ...]:
    """Return for each layer what is so for its layer group."""
    return tuple(map(of_groups.__getitem__, variants.group_of_layer))


def _group_rows(
    index: int, attending: Sequence[Scheduled], layout: PageLayout, rows: _Rows
) -> GroupRows:
    tables = [s.request.pages[index] for s in attending]
    pages, table_starts = _joined(b"".join(tables), tables)
    tokens = layout.tokens_per_page[index]
    count = int(rows.query_starts[len(attending)])
    if rows.owner is None:
        slots = np.array(_slots_of_singles(tables, attending, tokens), dtype=np.int64)
    else:
        places = rows.positions[:count]
        page = pages[table_starts[rows.owner[:count]] + places // tokens].astype(np.int64)
        slots = page * tokens + places % tokens
    return GroupRows(len(attending), count, pages, table_starts, slots)


def _slots_of_singles(
    tables: Sequence[array[int]], sequences: Sequence[Scheduled], tokens: int
) -> list[int]:
    own = zip(tables, sequences, strict=True)
    return [table[s.start // tokens] * tokens + s.start % tokens for table, s in own]


def _joined(pages: bytes, tables: Sequence[array[int]]) -> tuple[NDArray[np.int32], Ints]:
    """Return the block tables, one after the other in these bytes, and where each starts."""
    starts = np.array([0, *accumulate(map(len, tables))], dtype=np.int64)
    return np.frombuffer(pages, dtype=np.int32), starts


def _scored_rows(
    sequences: Sequence[Scheduled], query_starts: Ints
) -> tuple[list[int], tuple[ScoredRow, ...]]:
    """Return the rows whose logits score a prompt token that was not reported yet."""
    rows: list[int] = []
    scored: list[ScoredRow] = []
    for index, s in enumerate(sequences):
        request = s.request
        if request.params.prompt_logprobs is None or not request.scores_prompt:
            continue
        first = max(s.start, request.num_scored_tokens)
        last = min(s.start + s.count, len(request.prompt) - 1)
        for position in range(first, last):
            rows.append(int(query_starts[index]) + position - s.start)
            token = request.prompt[position + 1]
            scored.append(ScoredRow(index, token, request.params.prompt_logprobs or 0))
    return rows, tuple(scored)


def _sampling_rows(requests: Iterable[Request]) -> Iterator[SamplingRow]:
    for r in requests:
        yield SamplingRow(r.params, r.prompt, r.output, int(r.pending is not None))
