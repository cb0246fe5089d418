"""Which variant a request gets that names none: by weight, and the same one for the same key."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping


class Split:
    """Variants with their shares of the requests."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = {variant: weight for variant, weight in weights.items() if weight}
        self._total = sum(self._weights.values())

    def choose(self, key: str | None) -> str:
        """Return a variant: chosen by a hash of `key`, at random without one."""
        point = (random.random() if key is None else _place(key)) * self._total  # noqa: S311
        for variant, weight in self._weights.items():
            point -= weight
            if point < 0:
                return variant
        return next(reversed(self._weights))


def _place(key: str) -> float:
    """Return a number from 0 to below 1 that depends on the key only."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
