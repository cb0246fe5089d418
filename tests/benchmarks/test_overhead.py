"""How the figures of the overhead benchmark fit together."""

from __future__ import annotations

import pytest

from benchmarks.overhead import Overhead, Run


def test_shares_are_of_what_it_takes_in_process() -> None:
    found = Overhead(32, Run(200.0, 0.004), Run(190.0, 0.0042, 0.0001, 0.00005))
    assert found.share == pytest.approx(0.05)
    assert found.cpu_share == pytest.approx(0.025)
