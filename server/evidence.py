"""Evidence: what the plan says a variant is worth, and what its substitutes take.

Plain numbers for the endpoints and the metrics, fixed for the life of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pruning.plan import Plan
from pruning.substitutes import Substitutes
from pruning.variants import Variants


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
    plan: Plan, variants: Variants, substitutes: Substitutes | None
) -> Mapping[str, Evidence]:
    """Return the evidence of each variant of a plan, by name."""
    found = {}
    for variant in variants:
        dropped = variant.dropped(variants.layers)
        size = (0, 0) if substitutes is None else substitutes.size(dropped)
        found[variant.name] = Evidence(_quality(plan, len(dropped)), *size)
    return found


def _quality(plan: Plan, depth: int) -> MeasuredQuality | None:
    quality = plan.quality(depth)
    if quality is None or plan.held_out is None:
        return None
    return MeasuredQuality(
        kl=quality.kl,
        agreement=quality.agreement,
        perplexity=quality.perplexity,
        perplexity_ratio=quality.perplexity / plan.held_out.perplexity,
        tokens=plan.held_out.tokens,
    )
