"""Budget: how much worse than the full model a variant may be, instead of how many layers it drops.

    --drop auto --max-kl 0.2        the most layers whose KL on held-out tokens is at most 0.2

A curve is what each depth of a ranking was measured to cost, shallowest first. This file compares
numbers; it knows nothing of models or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pruning.divergence import Quality

AUTO = "auto"
"""The number of layers to drop that stands for a budget."""

PATIENCE = 2
"""Depths in a row that must break a budget before deeper ones are not measured: deeper is worse,
but for noise."""


class BudgetError(ValueError):
    """A budget is not usable."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that all must hold.

    Raises:
        BudgetError: a limit can never or will always hold, or there is none.
    """

    max_kl: float | None = None
    """KL(full || variant), nats a token."""
    min_agreement: float | None = None
    """Share of tokens where both find the same one most likely."""
    max_perplexity_ratio: float | None = None
    """Perplexity over the full model's."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise BudgetError(problem)

    def __str__(self) -> str:
        limits = (
            ("KL at most {:g}", self.max_kl),
            ("agreement at least {:g}", self.min_agreement),
            ("perplexity at most {:g} x full's", self.max_perplexity_ratio),
        )
        return ", ".join(text.format(limit) for text, limit in limits if limit is not None)

    def allows(self, quality: Quality, full_perplexity: float) -> bool:
        """Whether a variant of this quality stays inside."""
        return (
            (self.max_kl is None or quality.kl <= self.max_kl)
            and (self.min_agreement is None or quality.agreement >= self.min_agreement)
            and (
                self.max_perplexity_ratio is None
                or quality.perplexity <= self.max_perplexity_ratio * full_perplexity
            )
        )

    def deepest(self, curve: Sequence[Quality | None], full_perplexity: float) -> int | None:
        """Return the most layers that stay inside, None if the curve does not say.

        Depths beyond `PATIENCE` broken ones in a row are not looked at, so the answer does not
        depend on how many of them were measured.

        Args:
            curve: the quality of each depth; curve[0] is for one layer dropped; None where it was
                not measured.
            full_perplexity: the full model's, on the same tokens.
        """
        found, needed = self._followed(curve, full_perplexity)
        return None if needed else found

    def depths_needed(self, curve: Sequence[Quality | None], full_perplexity: float) -> int:
        """Return how many of the curve's depths must be measured next, at the least, before
        `deepest` can answer; 0 if it can."""
        return self._followed(curve, full_perplexity)[1]

    def _followed(self, curve: Sequence[Quality | None], full_perplexity: float) -> tuple[int, int]:
        """Return the deepest depth inside, as far as is known, and how many more must be known."""
        found, outside = 0, 0
        for depth, quality in enumerate(curve, start=1):
            if outside == PATIENCE:
                break
            if quality is None:
                return found, PATIENCE - outside
            if self.allows(quality, full_perplexity):
                found, outside = depth, 0
            else:
                outside += 1
        return found, 0

    def _problems(self) -> Iterator[str]:
        if self.max_kl is None and self.min_agreement is None and self.max_perplexity_ratio is None:
            yield "a budget needs --max-kl, --min-agreement or --max-perplexity-ratio"
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl > 0):
            yield f"--max-kl must be above 0 nats, not {self.max_kl}"
        if self.min_agreement is not None and not 0 < self.min_agreement < 1:
            yield f"--min-agreement must be between 0 and 1, not {self.min_agreement}"
        ratio = self.max_perplexity_ratio
        if ratio is not None and not (math.isfinite(ratio) and ratio > 1):
            yield f"--max-perplexity-ratio must be above 1, not {ratio}"


DEFAULT_BUDGET = Budget(max_kl=0.2)
"""What is dropped where nobody says how much."""


def chosen(
    drop: str | None,
    max_kl: float | None,
    min_agreement: float | None,
    max_perplexity_ratio: float | None,
) -> str | Budget | None:
    """Return what options ask to drop: a number or share of layers, or a budget; else None.

    Raises:
        BudgetError: a limit is not usable, or stands beside a number of layers.
    """
    limits = (max_kl, min_agreement, max_perplexity_ratio)
    if all(limit is None for limit in limits):
        return DEFAULT_BUDGET if drop == AUTO else drop
    budget = Budget(*limits)
    if drop not in (None, AUTO):
        raise BudgetError(
            f"--drop {drop} says how many layers to drop, and a budget ({budget}) does too; give "
            f"one of them, or --drop {AUTO}"
        )
    return budget
