"""The folder of the quality benchmark: plans, evidence and how long each took, kept between runs.

A run that was broken off, or that adds one more plan, does not measure again what lies there and
answers the same question. Knows files; knows nothing of how they come about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pruning.calibration import calibration_source
from pruning.evidence import Amount, Evaluation, read_evidence, write_evidence
from pruning.files import write_atomically
from pruning.loading import BaseModel
from pruning.plan import Plan, dtype_name, read_with_substitutes, versions, write_plan
from pruning.plan_cache import PlanRequest
from pruning.substitutes import Substitutes


class Results:
    """Plans and evidence by the names of what is judged."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def plan(
        self, name: str, request: PlanRequest, base: BaseModel
    ) -> tuple[Plan, Substitutes | None, float] | None:
        """Return the plan that was made for the same request, its substitutes, and the seconds it
        took; None if there is none."""
        path = self._path(name, "plan.json")
        if not path.exists():
            return None
        plan, substitutes = read_with_substitutes(path)
        made_of = plan.calibration
        same = (
            plan.model.fingerprint == base.fingerprint
            and plan.dtype == dtype_name(base)
            and made_of is not None
            and (made_of.samples, made_of.length) == (request.samples, request.length)
            and made_of.sources == tuple(map(calibration_source, request.calibration))
            and plan.candidates in (None, request.candidates)
        )
        return (plan, substitutes, self._seconds(name, "made")) if same else None

    def keep_plan(
        self, name: str, plan: Plan, substitutes: Substitutes | None, seconds: float
    ) -> None:
        write_plan(self._path(name, "plan.json"), plan, substitutes)
        self._note(name, "made", seconds)

    def evidence(
        self, name: str, plan: Plan, base: BaseModel, amount: Amount, depths: Sequence[int]
    ) -> tuple[Evaluation, float] | None:
        """Return what was found about the same plan by measuring as much, and the seconds it took;
        None if there is nothing."""
        path = self._path(name, "evidence.json")
        if not path.exists():
            return None
        found = read_evidence(path)
        same = (
            found.plan == plan.id
            and found.fingerprint == base.fingerprint
            and (found.dtype, found.device) == (dtype_name(base), str(base.device))
            and found.amount == amount
            and found.versions == versions()
            and {row.dropped for row in found.figures} == {0, *depths}
        )
        return (found, self._seconds(name, "judged")) if same else None

    def keep_evidence(self, name: str, found: Evaluation, seconds: float) -> None:
        write_evidence(self._path(name, "evidence.json"), found)
        self._note(name, "judged", seconds)

    def _path(self, name: str, ending: str) -> Path:
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        return self._folder / f"{slug}.{ending}"

    def _seconds(self, name: str, what: str) -> float:
        return float(json.loads(self._path(name, f"{what}-seconds.json").read_text()))

    def _note(self, name: str, what: str, seconds: float) -> None:
        write_atomically(self._path(name, f"{what}-seconds.json"), json.dumps(seconds).encode())
