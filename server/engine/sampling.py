"""Choosing tokens: vectorised over the rows of a step, deterministic per request.

Every row draws one uniform number from a hash of its request's seed and the number of tokens it
has generated, so a request's text depends neither on its neighbours in the batch nor on being
preempted. The order of operations is vLLM's: bias and bans, penalties, temperature, min_p, top_k,
top_p. Knows tensors and `SamplingParams`, nothing of pages or variants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.batch import SamplingRow, ScoredRow
from server.engine.request import TokenLogprobs

_MASK = (1 << 64) - 1


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Return one token id per row. logits is [rows, vocabulary] in float32 and is kept."""
    if not rows:
        return []
    adjusted = _adjusted(logits, rows)
    tokens = adjusted.argmax(dim=-1)
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if random:
        chosen = [rows[i] for i in random]
        index = torch.tensor(random, device=logits.device)
        tokens[index] = _draw(_probabilities(adjusted[index], chosen), chosen)
    return tokens.tolist()


def generated_logprobs(
    logits: Tensor, rows: Sequence[SamplingRow], tokens: Sequence[int]
) -> list[TokenLogprobs | None]:
    """Return the log probabilities of sampled tokens for the rows that report them.

    They are those of the model's own distribution, before bias, penalties and temperature.
    """
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    found: list[TokenLogprobs | None] = [None] * len(rows)
    scored = score(
        logits[wanted],
        [tokens[i] for i in wanted],
        [rows[i].params.logprobs or 0 for i in wanted],
    )
    for i, logprobs in zip(wanted, scored, strict=True):
        found[i] = logprobs
    return found


def prompt_logprobs(logits: Tensor, rows: Sequence[ScoredRow]) -> list[TokenLogprobs]:
    """Return the log probability of each scored prompt token."""
    return score(logits, [row.token for row in rows], [row.alternatives for row in rows])


def score(
    logits: Tensor, tokens: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    """Return each row's log probability of its token and its most likely alternatives.

    logits is [rows, vocabulary] in float32. A token that is among the alternatives has the
    identical float there.
    """
    if not tokens:
        return []
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    widest = max(alternatives)
    values, ids = logprobs.topk(widest, dim=-1) if widest else (logprobs[:, :0],) * 2
    return [
        TokenLogprobs(token, logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, logprob, row_ids, row_values, count in zip(
            tokens, own, ids.tolist(), values.tolist(), alternatives, strict=True
        )
    ]


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
            logits[i, list(ids)] += torch.tensor(bias, device=logits.device, dtype=logits.dtype)
        if len(row.output) < row.params.min_tokens:
            logits[i, list(row.params.stop_token_ids)] = float("-inf")
        if row.params.uses_penalties:
            _penalise(logits[i], row)
    return logits


def _is_adjusted(row: SamplingRow) -> bool:
    params = row.params
    banned = len(row.output) < params.min_tokens and bool(params.stop_token_ids)
    return bool(params.logit_bias) or banned or params.uses_penalties


def _penalise(logits: Tensor, row: SamplingRow) -> None:
    """Apply the penalties in place to one row [vocabulary].

    Presence and frequency count generated tokens (OpenAI); repetition counts prompt tokens too
    (Keskar et al., arXiv 1909.05858).
    """
    counts = torch.bincount(
        torch.tensor(row.output, dtype=torch.long, device=logits.device), minlength=len(logits)
    )
    params = row.params
    if params.repetition_penalty != 1:
        seen = counts > 0
        seen[torch.tensor(row.prompt, dtype=torch.long, device=logits.device)] = True
        factor = params.repetition_penalty
        penalised = torch.where(logits > 0, logits / factor, logits * factor)
        logits.copy_(torch.where(seen, penalised, logits))
    logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _probabilities(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return unnormalised probabilities after temperature and truncation, [rows, vocabulary]."""
    device = logits.device
    temperature = torch.tensor([row.params.temperature for row in rows], device=device)
    probabilities = torch.softmax(logits / temperature[:, None], dim=-1)
    min_p = torch.tensor([row.params.min_p for row in rows], device=device)
    if any(row.params.min_p > 0 for row in rows):
        floor = min_p * probabilities.amax(dim=-1)
        probabilities = probabilities.masked_fill(probabilities < floor[:, None], 0.0)
    truncated = [i for i, row in enumerate(rows) if row.params.top_p < 1 or row.params.top_k]
    if truncated:
        index = torch.tensor(truncated, device=device)
        probabilities[index] = _truncate(probabilities[index], [rows[i] for i in truncated])
    return probabilities


def _truncate(probabilities: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Zero all but the top_k tokens, then all but the smallest set that holds top_p of them."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    device, vocabulary = probabilities.device, probabilities.shape[1]
    top_k = torch.tensor([row.params.top_k or vocabulary for row in rows], device=device)
    beyond = torch.arange(vocabulary, device=device) >= top_k[:, None]
    ordered = ordered.masked_fill(beyond, 0.0)
    top_p = torch.tensor([row.params.top_p for row in rows], device=device)
    before = ordered.cumsum(dim=-1) - ordered
    outside = before >= top_p[:, None] * ordered.sum(dim=-1, keepdim=True)
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, ids, ordered)


def _draw(probabilities: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Invert each row's distribution function at its own random number."""
    cumulative = probabilities.double().cumsum(dim=-1)
    numbers = [uniform(row.params.seed, len(row.output)) for row in rows]
    targets = torch.tensor(numbers, dtype=torch.float64, device=probabilities.device)
    targets = targets[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(
        max=probabilities.shape[1] - 1
    )
