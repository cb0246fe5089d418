"""Evidence: what its plan says a variant is worth, and what its substitutes take.

Plain numbers for the endpoints and the metrics, fixed for the life of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pruning.plan import Plan
from server.planned import Planned


@dataclass(frozen=True, slots=True)
class MeasuredQuality:
    """A variant beside the full model, on calibration tokens that did not choose what it drops."""

    kl: float
    """KL(full || variant) in nats, mean over tokens."""
    agreement: float
    """Share of the tokens where both find the same one most likely."""
    perplexity: float
    perplexity_ratio: float
    """Over the full model's."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one variant."""

    quality: MeasuredQuality | None
    """None where it was not measured."""
    substitute_parameters: int
    substitute_bytes: int


def evidence_of_variants(
    planned: Mapping[str, Planned],
) -> Mapping[str, Evidence]:
    """Return the evidence of each variant, by name."""
    return {name: Evidence(_quality(each.plan), *each.size) for name, each in planned.items()}


def _quality(plan: Plan) -> MeasuredQuality | None:
    quality = plan.quality()
    if quality is None or plan.held_out is None:
        return None
    return MeasuredQuality(
        kl=quality.kl,
        agreement=quality.agreement,
        perplexity=quality.perplexity,
        perplexity_ratio=quality.perplexity / plan.held_out.perplexity,
        tokens=plan.held_out.tokens,
    )
