"""Log probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from server.api.generation import Shown
from server.engine.detokenize import Vocabulary
from server.engine.request import TokenLogprobs

LOWEST = -9999.0
"""OpenAI's way to say that a token is very unlikely; JSON has no infinity."""


def completion_logprobs(vocabulary: Vocabulary, shown: Sequence[Shown]) -> dict[str, Any]:
    """Return the completions shape: parallel lists, null where a token has no probability."""
    return {
        "tokens": [vocabulary.token_text(entry.token) for entry in shown],
        "token_logprobs": [
            None if entry.logprobs is None else _finite(entry.logprobs.logprob) for entry in shown
        ],
        "top_logprobs": [
            None if entry.logprobs is None else _alternatives(vocabulary, entry.logprobs)
            for entry in shown
        ],
        "text_offset": [entry.offset for entry in shown],
    }


def chat_logprobs(vocabulary: Vocabulary, shown: Iterable[Shown]) -> dict[str, Any]:
    """Return the chat shape: one object a token."""
    content = []
    for entry in shown:
        if entry.logprobs is not None:
            top = [_chat_entry(vocabulary, *pair) for pair in entry.logprobs.top]
            own = _chat_entry(vocabulary, entry.token, entry.logprobs.logprob)
            content.append({**own, "top_logprobs": top})
    return {"content": content, "refusal": None}


def _alternatives(vocabulary: Vocabulary, logprobs: TokenLogprobs) -> dict[str, float]:
    """Return text to log probability: the chosen token and the most likely ones.

    Different tokens can have the same text; a later one is then named by its id, so that neither
    the chosen token's number nor the highest one is lost.
    """
    found = {vocabulary.token_text(logprobs.token): _finite(logprobs.logprob)}
    for token, logprob in logprobs.top:
        if token != logprobs.token:
            text = vocabulary.token_text(token)
            found[f"token_id:{token}" if text in found else text] = _finite(logprob)
    return found


def _chat_entry(vocabulary: Vocabulary, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": vocabulary.token_text(token),
        "logprob": _finite(logprob),
        "bytes": list(vocabulary.token_bytes(token)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
