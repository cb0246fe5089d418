"""Planned: the plan that a variant comes from, and the substitutes of what it drops.

Variants may come from several plans. The attention sublayers hold one substitute each, so two
variants that drop the same layer must want the same one there, or none both. This file compares
and attaches; it knows nothing of settings or of how plans are found.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from pruning.loading import BaseModel
from pruning.plan import Plan
from pruning.substitutes import LinearSubstitute, SubstituteError, Substitutes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan that drops what a variant drops."""

    plan: Plan
    substitutes: Substitutes | None
    """Of all its ranked layers."""

    @property
    def size(self) -> tuple[int, int]:
        """Parameters and bytes of what stands in dropped sublayers' places."""
        if self.substitutes is None:
            return 0, 0
        return self.substitutes.size(self.plan.dropped_layers())

    def substitute(self, layer: int) -> LinearSubstitute | None:
        """Return what stands in a dropped layer's place."""
        return None if self.substitutes is None else self.substitutes.by_layer.get(layer)


def attach_substitutes(base: BaseModel, planned: Mapping[str, Planned]) -> None:
    """Put the substitutes of all dropped layers into their places.

    Raises:
        SubstituteError: one is missing, is for another width, or is not what another variant that
            drops the same layer needs.
    """
    places: dict[int, tuple[str, LinearSubstitute | None]] = {}
    for name, each in planned.items():
        for layer in sorted(each.plan.dropped_layers()):
            other, there = places.setdefault(layer, (name, each.substitute(layer)))
            if not _are_same(layer, there, each.substitute(layer)):
                raise SubstituteError(
                    f"variants {other!r} and {name!r} both drop the attention of layer {layer}, "
                    "but want different substitutes in its place, and a server has one place for "
                    "each layer; take both from one plan, or serve them by two servers behind "
                    "`attndrop gateway`"
                )
    for each in planned.values():
        if each.substitutes is not None:
            each.substitutes.attach(base, each.plan.dropped_layers())
    if attached := {layer: found for layer, (_, found) in places.items() if found is not None}:
        logger.info("%s", Substitutes(attached).described(attached))


def _are_same(layer: int, one: LinearSubstitute | None, other: LinearSubstitute | None) -> bool:
    if one is None or other is None:
        return one is other
    return Substitutes({layer: one}).fingerprint == Substitutes({layer: other}).fingerprint
