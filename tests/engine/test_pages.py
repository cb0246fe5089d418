"""Page layouts and the free list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.pages import PageLeakError, PagePool, page_layout


def test_half_dropped_holds_exactly_twice_the_tokens() -> None:
    layout = page_layout([16, 16], 100)
    for pages in (2, 10, 64):
        assert layout.capacity(pages, [0]) == 2 * layout.capacity(pages, [0, 1])


def test_smaller_groups_hold_more_tokens_a_page() -> None:
    assert page_layout([22, 8], 1).tokens_per_page == (16, 44)
    assert page_layout([15, 15], 1).tokens_per_page == (16, 16)


def test_pages_end_together_soon_where_that_wastes_little() -> None:
    # 21 and 69 would waste nothing, and end together after 483 tokens.
    assert page_layout([23, 7], 1).tokens_per_page == (16, 48)


@given(st.lists(st.integers(1, 80), min_size=1, max_size=6), st.integers(1, 4096))
def test_no_group_overflows_a_page_and_little_is_wasted(groups: list[int], elements: int) -> None:
    layout = page_layout(groups, elements)
    used = 0.0
    for layers, tokens in zip(groups, layout.tokens_per_page, strict=True):
        assert layers * tokens * elements <= layout.page_elements
        used += layout.page_elements / tokens
    assert min(layout.tokens_per_page) >= 16
    assert max(groups) * min(layout.tokens_per_page) * elements == layout.page_elements
    assert sum(groups) * elements / used > 0.8


@given(st.lists(st.integers(1, 80), min_size=1, max_size=4), st.integers(0, 200))
def test_capacity_is_the_most_that_fits(groups: list[int], pages: int) -> None:
    layout = page_layout(groups, 1)
    every = range(len(groups))

    def needed(tokens: int) -> int:
        return sum(layout.pages_for(tokens, group) for group in every)

    capacity = layout.capacity(pages, list(every))
    assert needed(capacity) <= pages < needed(capacity + 1)


def test_leaks_and_sharing_are_found() -> None:
    pool = PagePool(4)
    taken = pool.take(2)
    pool.check([taken])
    with pytest.raises(PageLeakError, match="2 are lost and 0 are shared"):
        pool.check([])
    with pytest.raises(PageLeakError, match="1 are shared"):
        pool.check([taken, taken[:1]])
    with pytest.raises(PageLeakError, match="3 pages taken where 2 are free"):
        pool.take(3)
