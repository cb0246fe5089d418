"""Variants: which layers keep attention under which name, and the layer groups they share.

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
    """A name and the layers that keep their attention sublayer."""

    name: str
    kept: frozenset[int]

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

    Their sets of kept layers must nest, so that in a batch ordered like them the rows attending
    in any layer are a prefix.

    Raises:
        VariantError: a name is malformed or taken twice, there is no `full` variant, a variant
            drops layer 0, or two sets do not nest.
    """

    def __init__(self, layers: int, variants: Sequence[Variant]) -> None:
        self.layers = layers
        self._ordered = tuple(
            sorted(variants, key=lambda v: (-len(v.kept), v.name != FULL, v.name))
        )
        self._by_name = {variant.name: variant for variant in self._ordered}
        self._check(variants)
        self.groups = self._layer_groups()
        self.group_of_layer = {
            layer: index for index, group in enumerate(self.groups) for layer in group.layers
        }
        self._order = {variant.name: index for index, variant in enumerate(self._ordered)}

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._ordered)

    def __len__(self) -> int:
        return len(self._ordered)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Variant:
        return self._by_name[name]

    def order(self, name: str) -> int:
        """Return the variant's place in a batch: 0 keeps the most attention."""
        return self._order[name]

    def groups_of(self, name: str) -> tuple[int, ...]:
        """Return the indices in `groups` of the layer groups that the variant attends."""
        return tuple(i for i, group in enumerate(self.groups) if name in group.variants)

    def _check(self, variants: Sequence[Variant]) -> None:
        if len(self._by_name) != len(variants):
            raise VariantError("two variants have the same name")
        if FULL not in self._by_name or len(self._by_name[FULL].kept) != self.layers:
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
        for more, less in zip(self._ordered, self._ordered[1:], strict=False):
            if not less.kept <= more.kept:
                raise VariantError(
                    f"variants {more.name!r} and {less.name!r} do not nest: layers "
                    f"{sorted(less.kept - more.kept)} are kept only by the second"
                )

    def _layer_groups(self) -> tuple[LayerGroup, ...]:
        by_signature: dict[frozenset[str], list[int]] = {}
        for layer in range(self.layers):
            signature = frozenset(v.name for v in self._ordered if layer in v.kept)
            by_signature.setdefault(signature, []).append(layer)
        groups = [LayerGroup(tuple(layers), who) for who, layers in by_signature.items()]
        return tuple(sorted(groups, key=lambda group: -len(group.variants)))
