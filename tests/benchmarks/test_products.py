"""Products on a GPU: how they are timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import products


def test_works_take_turns_and_their_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ours": iter([1.0, 3.0, 2.0]), "peer": iter([9.0, 5.0, 7.0])}
    order: list[str] = []

    def seconds(work: Callable[[int], str], count: int) -> float:
        order.append(work(count))
        return next(times[order[-1]])

    monkeypatch.setattr(products, "graph_seconds", seconds)
    got = products._in_turns(lambda _: "ours", lambda _: "peer", copies=2)
    assert got == [2e6, 7e6]
    assert order == ["ours", "peer"] * 3
