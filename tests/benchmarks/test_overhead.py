"""How the figures of the overhead benchmark fit together."""

from __future__ import annotations

import pytest

from benchmarks.overhead import Overhead, Run

INSIDE, OVER = Run(200.0, 0.004), Run(190.0, 0.0042, 0.0001, 0.00005)


def test_shares_are_of_what_it_takes_in_process() -> None:
    found = Overhead(32, 2, ((INSIDE, OVER),), ())
    assert found.shares == pytest.approx([0.05])
    assert found.cpu_share == pytest.approx(0.025)


def test_runs_are_compared_within_their_pair() -> None:
    slower = (Run(100.0, 0.008), Run(98.0, 0.008, 0.0001, 0.00005))
    found = Overhead(32, 2, ((INSIDE, OVER), slower, slower), ())
    assert found.shares == pytest.approx([0.02, 0.02, 0.05])
    assert found.in_process.tokens_per_second == 100.0


def test_what_others_take_is_a_share_of_all_cores() -> None:
    found = Overhead(32, 2, ((INSIDE, OVER),), ())
    assert found.cores_share == pytest.approx(190 * 0.00015 / 2)
