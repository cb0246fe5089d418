"""Pages: KV memory cut into equal pieces that all variants share.

A page is a fixed number of bytes and belongs to one layer group at a time: it holds the keys and
values of that group's layers for as many tokens as fit. Groups of fewer layers hold more tokens a
page. With 32 layers, 16 of them dropped by `pruned`::

    full    group 0  [3][9][4]     16 layers both variants attend
            group 1  [7][1][8]     16 layers only full attends
    pruned  group 0  [2][6][5]     and nothing else: half of the pages

Plain Python: counts and page ids, no tensors.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

_LONG = 1024
"""Tokens after which few prompts still begin alike."""
DEFAULT_PAGE_TOKENS = 16
"""Tokens in a page of the largest layer group, at the least."""


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How a page is divided in each layer group."""

    tokens_per_page: tuple[int, ...]
    """Per layer group."""
    page_elements: int
    """Elements of the KV dtype in a page."""

    def pages_for(self, tokens: int, group: int) -> int:
        """Return how many pages `tokens` tokens need in a layer group."""
        return -(-tokens // self.tokens_per_page[group])

    def capacity(self, pages: int, groups: Sequence[int]) -> int:
        """Return how many tokens of one request fit in `pages` pages over these groups."""
        low, high = 0, pages * max(self.tokens_per_page)
        while low < high:
            middle = (low + high + 1) // 2
            if sum(self.pages_for(middle, group) for group in groups) <= pages:
                low = middle
            else:
                high = middle - 1
        return low


def page_layout(group_layers: Sequence[int], elements_per_layer_token: int) -> PageLayout:
    """Choose how many tokens a page holds in each layer group.

    Args:
        group_layers: the number of layers in each group.
        elements_per_layer_token: elements of K and V that one layer keeps for one token.

    The largest group gets between 16 and 31 tokens a page, the others as many as fit or a few
    less. Two things cost: the share of a page pool that a request of all groups leaves unused, and
    the tokens after which the pages of all groups end together, below which no beginning can be
    shared. 64 tokens weigh as much as 1 % of the pool; from `_LONG` on they do not matter more.
    """
    largest = max(group_layers)

    def cost(base: int, tokens: Sequence[int]) -> tuple[float, int]:
        used = sum(base * largest / count for count in tokens)
        return 100 * (1 - sum(group_layers) / used) + min(math.lcm(*tokens), _LONG) / 64, base

    layouts = (
        (base, tokens)
        for base in range(DEFAULT_PAGE_TOKENS, 2 * DEFAULT_PAGE_TOKENS)
        for tokens in _tokens_per_page(base, group_layers)
    )
    base, tokens = min(layouts, key=lambda layout: cost(*layout))
    return PageLayout(tokens, base * largest * elements_per_layer_token)


def _tokens_per_page(base: int, group_layers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield what each group may hold together; groups of one size hold the same."""
    sizes, largest = sorted(set(group_layers)), max(group_layers)
    for choice in product(*(_choices(base, base * largest // size) for size in sizes)):
        by_size = dict(zip(sizes, choice, strict=True))
        yield tuple(by_size[size] for size in group_layers)


def _choices(base: int, most: int) -> Sequence[int]:
    """Return what a group may hold: the most that fits, and fewer that end with other groups. The
    largest group fills its pages."""
    if most == base:
        return (base,)
    steps = (base, base // 2, base // 4)
    return tuple({most, *(most // step * step for step in steps if most >= step)})


@dataclass(slots=True, eq=False)
class Block:
    """The pages of as many tokens as fill whole pages in every layer group of a variant.

    The smallest piece that requests share; see the prefix cache.
    """

    key: bytes
    """Stands for the variant, the block's tokens and all tokens before them."""
    variant: str
    pages: tuple[array[int], ...]
    """For each of the variant's layer groups, in order."""
    users: int
    """Requests whose block tables hold it."""


class PageLeakError(AssertionError):
    """Pages were lost, shared or given back twice: a bug in the engine."""


class PagePool:
    """The free list over all pages."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` pages. The caller has checked that they are free."""
        if count > len(self._free):
            raise PageLeakError(f"{count} pages taken where {len(self._free)} are free")
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)

    def check(self, owned: Iterable[Iterable[int]]) -> None:
        """Check that every page is free or has exactly one owner.

        Raises:
            PageLeakError: pages are lost, or have several owners.
        """
        owners = [0] * self.pages
        for page in self._free:
            owners[page] += 1
        for pages in owned:
            for page in pages:
                owners[page] += 1
        if any(count != 1 for count in owners):
            lost, shared = owners.count(0), sum(count > 1 for count in owners)
            raise PageLeakError(f"of {self.pages} pages, {lost} are lost and {shared} are shared")
