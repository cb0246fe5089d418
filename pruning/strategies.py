"""The strategies that rank layers, by the names that users and plans know them by."""

from __future__ import annotations

from collections.abc import Mapping

from pruning.search import search
from pruning.selection import DEFAULT_STRATEGY, GREEDY, Strategy, cosine, greedy

SEARCH = "search"

STRATEGIES: Mapping[str, Strategy] = {DEFAULT_STRATEGY: cosine, GREEDY: greedy, SEARCH: search}

TRYING = frozenset({GREEDY, SEARCH})
"""Those that try candidates."""
