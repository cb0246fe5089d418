"""Choosing tokens: vectorised over the rows of a step, deterministic per request.

Every row draws one uniform number from a hash of its request's seed and the number of tokens it
has generated, so a request's text depends neither on its neighbours in the batch nor on being
preempted. The order of operations is vLLM's: bias and bans, penalties, temperature, min_p, top_k,
top_p. Knows tensors and `SamplingParams`, nothing of pages or variants. Nothing here waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.batch import SamplingRow, ScoredRow
from server.engine.request import TokenLogprobs
from server.engine.transfer import download, upload

_MASK = (1 << 64) - 1


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return one token id per row, [rows] on the device of the logits.

    logits is [rows, vocabulary] in float32 and is kept.
    """
    if not rows:
        return torch.empty(0, dtype=torch.long, device=logits.device)
    adjusted = _adjusted(logits, rows)
    tokens = most_likely(adjusted)
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if random:
        chosen = [rows[i] for i in random]
        index = _index(random, logits)
        tokens[index] = _draw(_probabilities(adjusted[index], chosen), chosen)
    return tokens


def most_likely(logits: Tensor) -> Tensor:
    """Return each row's most likely token, [rows]; the first of several.

    In two stages where the vocabulary divides: a GPU gives a row of a plain argmax to one of its
    multiprocessors.
    """
    if logits.device.type == "cpu":
        return torch.from_numpy(_largest(logits))
    parts = math.gcd(logits.shape[-1], 128)
    best, places = logits.unflatten(-1, (parts, -1)).max(dim=-1)  # type: ignore[no-untyped-call]
    part = best.argmax(dim=-1, keepdim=True)
    chosen: Tensor = part * (logits.shape[-1] // parts) + places.gather(1, part)
    return chosen[:, 0]


def _largest(logits: Tensor) -> NDArray[np.int64]:
    """Return the place of each row's largest number, by numpy, which takes a seventh of torch's
    time. Numbers of 16 bits that are above 0 have the order of their bits, and nothing below 0 is
    above them by its bits, so they are not made wider."""
    if logits.dtype == torch.bfloat16:
        bits = logits.view(torch.int16).numpy()
        places: NDArray[np.int64] = bits.argmax(axis=-1)
        if all(row[place] > 0 for row, place in zip(bits, places.tolist(), strict=True)):
            return places
    found: NDArray[np.int64] = logits.float().numpy().argmax(axis=-1)
    return found


def is_plain_greedy(row: SamplingRow) -> bool:
    """Whether the row's token is simply the most likely one, with nothing else to report."""
    params = row.params
    return params.temperature == 0 and params.logprobs is None and not _is_adjusted(row)


@dataclass(frozen=True, slots=True)
class Scores:
    """Log probabilities of some rows, in host memory once the device has got there."""

    tokens: Tensor
    """[rows]"""
    own: Tensor
    """[rows] log probability of the token."""
    ids: Tensor
    """[rows, alternatives] the most likely tokens, best first."""
    values: Tensor
    """[rows, alternatives]"""
    alternatives: tuple[int, ...]
    """How many of them each row reports."""

    def read(self) -> list[TokenLogprobs]:
        rows = zip(
            self.tokens.tolist(), self.own.tolist(), self.ids.tolist(), self.values.tolist(),
            self.alternatives, strict=True,
        )  # fmt: skip
        return [
            TokenLogprobs(token, own, tuple(zip(ids[:count], values[:count], strict=True)))
            for token, own, ids, values, count in rows
        ]


def generated_scores(logits: Tensor, rows: Sequence[SamplingRow], tokens: Tensor) -> Scores | None:
    """Return the scores of the sampled tokens of those rows that report them.

    They are those of the model's own distribution, before bias, penalties and temperature.
    """
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanted:
        return None
    index = _index(wanted, logits)
    return score(logits[index], tokens[index], [rows[i].params.logprobs or 0 for i in wanted])


def prompt_scores(logits: Tensor, rows: Sequence[ScoredRow]) -> Scores | None:
    """Return the scores of prompt tokens, one for each row."""
    if not rows:
        return None
    tokens = _index([row.token for row in rows], logits)
    return score(logits, tokens, [row.alternatives for row in rows])


def score(logits: Tensor, tokens: Tensor, alternatives: Sequence[int]) -> Scores:
    """Return each row's log probability of its token and its most likely alternatives.

    logits is [rows, vocabulary] in float32, tokens [rows]. A token that is among the alternatives
    has the identical float there.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(max(alternatives), dim=-1)
    return Scores(
        tokens=download(tokens),
        own=download(logprobs.gather(1, tokens[:, None])[:, 0]),
        ids=download(ids),
        values=download(values),
        alternatives=tuple(alternatives),
    )


def uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over both of them.
    """
    return _splitmix(_splitmix(seed & _MASK) ^ (index & _MASK)) / 2.0**53


def _splitmix(state: int) -> int:
    """Return 53 well mixed bits."""
    mixed = (state + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) >> 11


def _adjusted(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return logits after logit_bias, min_tokens and penalties; a copy only where one applies."""
    if not any(_is_adjusted(row) for row in rows):
        return logits
    logits = logits.clone()
    for i, row in enumerate(rows):
        if row.params.logit_bias:
            ids, bias = zip(*row.params.logit_bias.items(), strict=True)
            logits[i].index_add_(0, _index(ids, logits), upload(bias, logits.dtype, logits.device))
        if row.generated < row.params.min_tokens:
            banned = _index(tuple(row.params.stop_token_ids), logits)
            logits[i].index_fill_(0, banned, float("-inf"))
        if row.params.uses_penalties:
            _penalise(logits[i], row)
    return logits


def _is_adjusted(row: SamplingRow) -> bool:
    params = row.params
    banned = row.generated < params.min_tokens and bool(params.stop_token_ids)
    return bool(params.logit_bias) or banned or params.uses_penalties


def _penalise(logits: Tensor, row: SamplingRow) -> None:
    """Apply the penalties in place to one row [vocabulary].

    Presence and frequency count generated tokens (OpenAI); repetition counts prompt tokens too
    (Keskar et al., arXiv 1909.05858).
    """
    output = _index(row.output, logits)
    counts = torch.zeros_like(logits).index_add_(
        0, output, torch.ones_like(output, dtype=logits.dtype)
    )
    params = row.params
    if params.repetition_penalty != 1:
        seen = (counts > 0).index_fill_(0, _index(row.prompt, logits), True)
        factor = params.repetition_penalty
        penalised = torch.where(logits > 0, logits / factor, logits * factor)
        logits.copy_(torch.where(seen, penalised, logits))
    logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _probabilities(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return unnormalised probabilities after temperature and truncation, [rows, vocabulary]."""
    temperature = _floats([row.params.temperature for row in rows], logits)
    probabilities = torch.softmax(logits / temperature[:, None], dim=-1)
    if any(row.params.min_p > 0 for row in rows):
        floor = _floats([row.params.min_p for row in rows], logits) * probabilities.amax(dim=-1)
        probabilities = probabilities.masked_fill(probabilities < floor[:, None], 0.0)
    truncated = [i for i, row in enumerate(rows) if row.params.top_p < 1 or row.params.top_k]
    if truncated:
        index = _index(truncated, logits)
        probabilities[index] = _truncate(probabilities[index], [rows[i] for i in truncated])
    return probabilities


def _truncate(probabilities: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Zero all but the top_k tokens, then all but the smallest set that holds top_p of them."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    vocabulary = probabilities.shape[1]
    top_k = _index([row.params.top_k or vocabulary for row in rows], probabilities)
    beyond = torch.arange(vocabulary, device=probabilities.device) >= top_k[:, None]
    ordered = ordered.masked_fill(beyond, 0.0)
    top_p = _floats([row.params.top_p for row in rows], probabilities)
    before = ordered.cumsum(dim=-1) - ordered
    outside = before >= top_p[:, None] * ordered.sum(dim=-1, keepdim=True)
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, ids, ordered)


def _draw(probabilities: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Invert each row's distribution function at its own random number."""
    cumulative = probabilities.double().cumsum(dim=-1)
    numbers = [uniform(row.params.seed, row.generated) for row in rows]
    targets = upload(numbers, torch.float64, probabilities.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(
        max=probabilities.shape[1] - 1
    )


def _index(values: Sequence[int], beside: Tensor) -> Tensor:
    return upload(values, torch.long, beside.device)


def _floats(values: Sequence[float], beside: Tensor) -> Tensor:
    return upload(values, torch.float32, beside.device)
