"""`attndrop report`: evidence and plans as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pruning.cli import user_errors
from pruning.evidence import EvidenceError, read_evidence
from pruning.files import write_atomically
from pruning.plan import read_plan
from pruning.report.page import page
from pruning.report.plot import SERIES
from pruning.report.subject import read_speed, subjects


def report_command(
    evidence: Annotated[
        list[Path], typer.Option(help="What `attndrop evaluate --json` wrote. Repeatable.")
    ],
    output: Annotated[Path, typer.Option(help="The HTML page to write.")],
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="The plans that the evidence is about, for their rankings. Repeatable."),
    ] = None,
    speed: Annotated[
        list[Path] | None,
        typer.Option(help="What `python -m benchmarks.paper --json` wrote. Repeatable."),
    ] = None,
) -> None:
    """Show what dropping costs, plan beside plan, as one page that needs no network."""
    with user_errors():
        if len(evidence) > SERIES:
            raise EvidenceError(f"a report compares at most {SERIES} plans, not {len(evidence)}")
        plans = [read_plan(path) for path in plan or ()]
        shown = subjects([read_evidence(path) for path in evidence], plans)
        known = {each.found.plan for each in shown}
        for path, each in zip(plan or (), plans, strict=True):
            if each.id not in known:
                raise EvidenceError(
                    f"no evidence is about plan {path} ({each.id}); evaluate it, or leave it out"
                )
        text = page(shown, [read_speed(path) for path in speed or ()])
        try:
            write_atomically(output, text.encode())
        except OSError as error:
            raise EvidenceError(
                f"cannot write {output}: {error.strerror}; choose another place"
            ) from error
    typer.echo(f"wrote {output}: {len(shown)} plans", err=True)
