"""Variants: which layers keep attention under which name, and the layer groups they share.

A variant may drop MLPs too. In a batch ordered by how much each variant keeps, the rows that a
sublayer is computed for must be a prefix. That holds for variants whose kept sublayers nest. Others
run in a pass of their own: variants
are put into chains, in each of which all sets nest, and a batch is of one chain::

    chain 0   full    0 1 2 3 4 5 6 7
              light   0 1 2 3   5 6 7
              pruned  0 1   3   5   7
    chain 1   other   0   2 3 4   6 7     does not nest in light

Pure data. Knows nothing of tensors, plans or requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FULL = "full"
"""The name of the variant that drops nothing. It always exists."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")


def is_name(text: str) -> bool:
    """Whether a variant may have this name."""
    return _NAME.fullmatch(text) is not None


class VariantError(ValueError):
    """A variant's name or layers are not usable."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A name, the layers that keep their attention sublayer, and those that lose their MLP."""

    name: str
    kept: frozenset[int]
    dropped_mlps: frozenset[int] = frozenset()

    @property
    def sublayers_lost(self) -> int:
        """What it drops beyond others, where it drops all that they drop: up to a constant."""
        return len(self.dropped_mlps) - len(self.kept)

    def nests_in(self, other: Variant) -> bool:
        """Whether it drops all that the other drops."""
        return self.kept <= other.kept and self.dropped_mlps >= other.dropped_mlps

    def dropped(self, layers: int) -> tuple[int, ...]:
        """Return the dropped layers of a model with `layers` layers, in order."""
        return tuple(layer for layer in range(layers) if layer not in self.kept)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers attended by exactly the same variants; what a page belongs to."""

    layers: tuple[int, ...]
    variants: frozenset[str]


class Variants:
    """The variants one server offers, those that keep more attention first.

    Each is in the first chain whose sets all nest with its own; `full` is in the first.

    Raises:
        VariantError: a name is malformed or taken twice, there is no `full` variant, or a variant
            drops layer 0.
    """

    def __init__(self, layers: int, variants: Sequence[Variant]) -> None:
        self.layers = layers
        self._ordered = tuple(
            sorted(variants, key=lambda v: (v.sublayers_lost, v.name != FULL, v.name))
        )
        self._by_name = {variant.name: variant for variant in self._ordered}
        self._check(variants)
        self.chains = self._nesting()
        """Names of variants that can be in one batch, those that keep more attention first."""
        self.chain_of = {name: i for i, chain in enumerate(self.chains) for name in chain}
        self.drop_mlps = any(variant.dropped_mlps for variant in self._ordered)
        self.groups = self._layer_groups()
        group_of = {layer: i for i, group in enumerate(self.groups) for layer in group.layers}
        self.group_of_layer = tuple(group_of[layer] for layer in range(self.layers))

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._ordered)

    def __len__(self) -> int:
        return len(self._ordered)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Variant:
        return self._by_name[name]

    def groups_of(self, name: str) -> tuple[int, ...]:
        """Return the indices in `groups` of the layer groups that the variant attends."""
        return tuple(i for i, group in enumerate(self.groups) if name in group.variants)

    def _check(self, variants: Sequence[Variant]) -> None:
        if len(self._by_name) != len(variants):
            raise VariantError("two variants have the same name")
        full = self._by_name.get(FULL)
        if full is None or len(full.kept) != self.layers or full.dropped_mlps:
            raise VariantError(f"there must be a variant {FULL!r} that keeps every layer")
        for variant in self._ordered:
            if not is_name(variant.name):
                raise VariantError(
                    f"variant name {variant.name!r} must be 1 to 32 lower-case letters, digits, "
                    "'.', '_' or '-', and start with a letter or digit"
                )
            if 0 not in variant.kept or not variant.kept <= set(range(self.layers)):
                raise VariantError(
                    f"variant {variant.name!r} must keep layer 0 and only layers below "
                    f"{self.layers}, but keeps {sorted(variant.kept)}"
                )
            if not variant.dropped_mlps <= set(range(1, self.layers)):
                raise VariantError(
                    f"variant {variant.name!r} can drop the MLPs of layers 1 to {self.layers - 1}, "
                    f"not {sorted(variant.dropped_mlps)}"
                )

    def _nesting(self) -> tuple[tuple[str, ...], ...]:
        chains: list[list[Variant]] = []
        for variant in self._ordered:
            for chain in chains:
                if variant.nests_in(chain[-1]):
                    chain.append(variant)
                    break
            else:
                chains.append([variant])
        return tuple(tuple(variant.name for variant in chain) for chain in chains)

    def _layer_groups(self) -> tuple[LayerGroup, ...]:
        by_signature: dict[frozenset[str], list[int]] = {}
        for layer in range(self.layers):
            signature = frozenset(v.name for v in self._ordered if layer in v.kept)
            by_signature.setdefault(signature, []).append(layer)
        groups = [LayerGroup(tuple(layers), who) for who, layers in by_signature.items()]
        return tuple(sorted(groups, key=lambda group: -len(group.variants)))
