"""From request bodies to sampling parameters: defaults, seeds, and what the model allows."""

from __future__ import annotations

import secrets

from server.api.errors import bad_request
from server.api.schema import Generation
from server.api.service import Service
from server.engine.request import SamplingParams

_SEED_BITS = 63


def choice_params(
    service: Service,
    body: Generation,
    *,
    count: int,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> list[SamplingParams]:
    """Return the sampling parameters of `count` choices, which differ only in their seeds.

    Raises:
        ApiError: 400 for token ids beyond the vocabulary or contradicting limits.
    """
    _check(service, body, max_tokens)
    stops = frozenset(body.stop_token_ids or ())
    seed = secrets.randbits(_SEED_BITS) if body.seed is None else body.seed
    return [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=_given(body.temperature, 1.0),
            top_p=_given(body.top_p, 1.0),
            top_k=body.top_k if body.top_k and body.top_k > 0 else None,
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            logit_bias=body.logit_bias or {},
            seed=seed + choice,
            stop_token_ids=stops if body.ignore_eos else stops | service.end_tokens,
            min_tokens=body.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for choice in range(count)
    ]


def _check(service: Service, body: Generation, max_tokens: int) -> None:
    service.check_tokens(list(body.logit_bias or ()), "logit_bias")
    service.check_tokens(body.stop_token_ids or [], "stop_token_ids")
    if (body.min_tokens or 0) > max_tokens:
        raise bad_request(
            f"'min_tokens' ({body.min_tokens}) is more than 'max_tokens' ({max_tokens})",
            "min_tokens",
        )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
