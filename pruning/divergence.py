"""Divergence: how far a pruned model's next-token distributions are from the full model's.

Of every predicted token: KL(full || pruned), the sum over the vocabulary of p (log p - log q), in
nats; whether both find the same token most likely; and -log q of the token that really follows,
whose mean is the logarithm of the perplexity. Computed in float32, averaged in float64.

What is held are the inputs of the head, [tokens, width], and one number a token. Logits exist for a
few rows at a time: the full model's are computed again for each comparison, and shared by all
models that are compared with it in one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.head import Head
from pruning.loading import BaseModel

_MOST_LOSS = 700.0
"""exp of more is beyond a float; a loss of 700 nats is as useless as any greater one."""


class DivergenceError(ValueError):
    """Two models cannot be compared."""


@dataclass(frozen=True, slots=True)
class Quality:
    """A pruned model beside the full one, mean over the predicted tokens."""

    kl: float
    """KL(full || pruned) in nats."""
    agreement: float
    """Share of the tokens where both find the same one most likely, 0 to 1."""
    perplexity: float
    """Of the pruned model."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The full model on the tokens that others are compared on."""

    tokens: int
    """Predicted ones."""
    perplexity: float


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """A pruned model beside the full one, for each predicted token; all on the CPU."""

    kl: Tensor
    """[tokens] float64, nats."""
    agrees: Tensor
    """[tokens] bool."""
    loss: Tensor
    """[tokens] float64: -log q of the token that follows."""

    @property
    def quality(self) -> Quality:
        return Quality(
            self.kl.mean().item(),
            self.agrees.double().mean().item(),
            perplexity(self.loss),
        )


def joined(parts: Sequence[Divergence]) -> Divergence:
    """Return one divergence over the tokens of all parts, in order."""
    return Divergence(
        torch.cat([part.kl for part in parts]),
        torch.cat([part.agrees for part in parts]),
        torch.cat([part.loss for part in parts]),
    )


class FullDistribution:
    """The full model's next-token distributions over fixed tokens."""

    def __init__(self, base: BaseModel, last: Tensor, targets: Tensor) -> None:
        """last is [tokens, width], what the full model's head sees; targets [tokens], the tokens
        that follow."""
        self._head = Head(base)
        self._last = last
        self._targets = targets.to(last.device)

    def baseline(self) -> Baseline:
        """Return what the full model itself is on these tokens.

        Raises:
            DivergenceError: its logits are not finite.
        """
        with torch.inference_mode():
            losses = [
                _loss(self._head.logprobs(self._last[rows]), self._targets[rows])
                for rows in self._head.slices(len(self._targets))
            ]
        loss = torch.cat(losses).cpu()
        self._check_finite(loss)
        return Baseline(len(loss), perplexity(loss))

    @torch.inference_mode()
    def compare(self, others: Sequence[Tensor]) -> list[Divergence]:
        """Return each model's divergence; others are [tokens, width], what their heads see.

        Raises:
            DivergenceError: a model's logits are not finite.
        """
        parts: list[list[_Rows]] = [[] for _ in others]
        for rows in self._head.slices(len(self._targets)):
            full = self._head.logprobs(self._last[rows])
            probabilities = full.exp()
            for other, found in zip(others, parts, strict=True):
                pruned = self._head.logprobs(other[rows])
                found.append(_compared(full, probabilities, pruned, self._targets[rows]))
        return [self._joined(found) for found in parts]

    def _joined(self, parts: Sequence[_Rows]) -> Divergence:
        found = Divergence(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))
        self._check_finite(found.kl)
        self._check_finite(found.loss)
        return found

    def _check_finite(self, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            dtype = str(self._last.dtype).removeprefix("torch.")
            raise DivergenceError(
                f"a divergence is not finite in {dtype}; load the model with --dtype bfloat16 or "
                "float32"
            )


_Rows = tuple[Tensor, Tensor, Tensor]
"""KL, agreement and loss of some rows."""


def _compared(full: Tensor, probabilities: Tensor, pruned: Tensor, targets: Tensor) -> _Rows:
    """Compare log probabilities [rows, vocabulary]; `probabilities` are exp(full)."""
    agrees = full.argmax(-1) == pruned.argmax(-1)
    kl = (probabilities * (full - pruned)).sum(-1)
    return kl.double(), agrees, _loss(pruned, targets)


def _loss(logprobs: Tensor, targets: Tensor) -> Tensor:
    """Return -log q of each target, [rows] float64."""
    return -logprobs.gather(1, targets[:, None])[:, 0].double()


def perplexity(loss: Tensor) -> float:
    """Return exp of the mean loss, in nats."""
    return math.exp(min(loss.mean().item(), _MOST_LOSS))
