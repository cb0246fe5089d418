"""How far predictions of next tokens are from a reference's, by full distributions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Quality:
    """Of predictions, beside the reference's."""

    perplexity: float
    kl: float
    """KL(reference || predictions), in nats."""
    agreement: float
    """How often both find the same token most likely."""


def compared(windows: Tensor, reference: Sequence[Tensor], found: Iterable[Tensor]) -> Quality:
    """Compare log probabilities of next tokens, [length - 1, vocabulary] for each of the windows
    [windows, length]."""
    loss = kl = agreed = 0.0
    for window, true, mine in zip(windows, reference, found, strict=True):
        loss -= float(mine.gather(1, window[1:, None]).double().sum())
        kl += float((true.exp() * (true - mine)).sum(-1).double().sum())
        agreed += float((true.argmax(-1) == mine.argmax(-1)).sum())
    count = len(reference) * (windows.shape[1] - 1)
    return Quality(math.exp(loss / count), kl / count, agreed / count)
