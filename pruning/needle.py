"""Needle: a sentence hidden in a long text, and how well a variant finds it when asked at the end.

::

    filler ... The secret code of Velora is 48213. ... filler
    Question: What is the secret code of Velora?
    Answer: The secret code of Velora is| 48213

Scored is what stands behind the bar: the name and the number are drawn from a seed, so nothing but
the sentence tells it. Knows tokens; knows nothing of variants.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pruning.evidence import EvidenceError, Retrieval, mean_and_error
from pruning.likelihood import Likelihood, Pair, encoded

_DIGITS = 5
_SYLLABLES = ("ba", "del", "fi", "gor", "ka", "lu", "mer", "no", "pol", "ra", "sti", "ve", "zan")


def hidden(
    tokenizer: PreTrainedTokenizerBase, windows: Tensor, depth: int, seed: int
) -> list[Pair]:
    """Return a prompt and its answer for each window [trials, length] of filler, as long as it.

    Args:
        depth: where the sentence stands, in percent of the filler.
        seed: of names and numbers; the same for every depth, so that depths differ in nothing else.

    Raises:
        EvidenceError: the windows are too short for the sentence and the question.
    """
    draw = random.Random(seed)  # noqa: S311 - nothing is secret here
    return [_hidden(tokenizer, window.tolist(), depth, draw) for window in windows]


def retrieval(found: Sequence[Likelihood], dropped: int, length: int, depth: int) -> Retrieval:
    """Return what trials at one length and depth found."""
    right, right_error = mean_and_error([each.greedy for each in found])
    logprob, error = mean_and_error([each.total / len(each.logprobs) for each in found])
    return Retrieval(dropped, length, depth, len(found), right, right_error, logprob, error)


def _hidden(
    tokenizer: PreTrainedTokenizerBase, window: list[int], depth: int, draw: random.Random
) -> Pair:
    name = "".join(draw.choices(_SYLLABLES, k=3)).capitalize()
    number = "".join(draw.choices("123456789", k=_DIGITS))
    fact = f"The secret code of {name} is"
    prefix = tokenizer.encode("")
    sentence = tokenizer.encode(f" {fact} {number}. ", add_special_tokens=False)
    asked = encoded(
        tokenizer, f"\nQuestion: What is the secret code of {name}?\nAnswer: {fact}", f" {number}"
    )
    question = list(asked.context[len(prefix) :])
    room = len(window) - len(prefix) - len(sentence) - len(question)
    if room < 1:
        raise EvidenceError(
            f"{len(window)} tokens are too few to hide a sentence in; it and its question take "
            f"{len(window) - room}"
        )
    filler = window[len(prefix) : len(prefix) + room]
    cut = room * depth // 100
    context = (*prefix, *filler[:cut], *sentence, *filler[cut:], *question)
    return Pair(context, asked.continuation)
