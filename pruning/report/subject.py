"""Subjects: what the report compares, each a piece of evidence and the plan that it is about.

Knows evidence, plans and speed files; knows nothing of how they are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.evidence import Choices, Evaluation, EvidenceError, Figures
from pruning.plan import Plan

MAX_SPEED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Subject:
    """A plan at several depths."""

    name: str
    look: int
    """Which colour, marker and dash it has in every plot."""
    found: Evaluation
    plan: Plan | None
    """None where its file was not given."""

    def rows(self, domain: str) -> list[Figures]:
        """Return its figures on a domain, the full model's first."""
        return [row for row in self.found.figures if row.domain == domain]

    def choices(self) -> dict[int, list[Choices]]:
        """Return its multiple-choice figures by depth."""
        by_depth: dict[int, list[Choices]] = {}
        for row in self.found.choices:
            by_depth.setdefault(row.dropped, []).append(row)
        return by_depth

    def kv_bytes(self, dropped: int) -> int:
        """Return the bytes of keys and values of a token when so many layers are dropped."""
        attention = self.found.attention_dropped
        without = dropped if attention is None else attention[dropped]
        return (self.found.layers - without) * self.found.kv_bytes


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """How fast a depth runs."""

    dropped: int
    tokens_per_second: float
    in_flight: int


@dataclass(frozen=True, slots=True)
class Speed:
    """What a benchmark measured."""

    title: str
    device: str
    rows: tuple[SpeedRow, ...]


def subjects(found: Sequence[Evaluation], plans: Sequence[Plan]) -> list[Subject]:
    """Return evidence and plans put together by the plans' ids.

    Raises:
        EvidenceError: the evidence is of several models.
    """
    if len(models := {each.fingerprint for each in found}) > 1:
        raise EvidenceError(
            f"the evidence is of {len(models)} different models; a report compares plans of one"
        )
    by_id = {plan.id: plan for plan in plans}
    names = [_name(each) for each in found]
    return [
        Subject(
            name if names.count(name) == 1 else f"{name} ({each.plan})",
            look,
            each,
            by_id.get(each.plan),
        )
        for look, (name, each) in enumerate(zip(names, found, strict=True))
    ]


def read_speed(path: Path) -> Speed:
    """Read what `python -m benchmarks.paper --json FILE` wrote.

    Raises:
        EvidenceError: not readable, or something else.
    """
    try:
        if path.stat().st_size > MAX_SPEED_BYTES:
            raise EvidenceError(f"speed file {path} has more than {MAX_SPEED_BYTES} bytes")
        body = json.loads(path.read_bytes())
        rows = tuple(_speed_row(row) for row in body["rows"])
        found = Speed(str(body["setting"]["title"]), str(body["machine"]["device"]), rows)
    except OSError as error:
        raise EvidenceError(f"cannot read speed file {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvidenceError(
            f"speed file {path} is not what `python -m benchmarks.paper --json FILE` writes: it "
            "needs 'setting.title', 'machine.device', and 'rows' with 'dropped', "
            "'tokens_per_second' and 'in_flight'"
        ) from error
    if not found.rows:
        raise EvidenceError(f"speed file {path} holds no rows")
    return found


def _speed_row(row: Any) -> SpeedRow:
    found = SpeedRow(int(row["dropped"]), float(row["tokens_per_second"]), int(row["in_flight"]))
    if not (math.isfinite(found.tokens_per_second) and found.tokens_per_second > 0):
        raise ValueError("no speed")
    return found


def _name(found: Evaluation) -> str:
    kind = found.substitutes_kind
    return found.strategy if kind is None else f"{found.strategy} + {kind}"
