"""`attndrop export`: a pruned model in the formats of other engines."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from pruning.cli import DropOption, ModelOption, plan_cache, progress_bars, user_errors
from pruning.export.exporting import DEFAULT_OPTIONS, FORMATS, export
from pruning.export.gguf_file import TYPES
from pruning.export.pruned import Options
from pruning.loading import EMBEDDED_MODEL, served_name
from pruning.plan import Plan, read_plan

_GIGABYTE = 10**9


def export_command(
    out: Annotated[Path, typer.Argument(help="The folder to make; for gguf, the file.")],
    format_name: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")],
    model: ModelOption = EMBEDDED_MODEL,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan file; by default the model's newest plan in the cache."),
    ] = None,
    drop: DropOption = None,
    gguf_type: Annotated[
        str, typer.Option(help=f"Type of gguf weights: {', '.join(TYPES)}.")
    ] = DEFAULT_OPTIONS.gguf_type,
    shard_size: Annotated[
        float, typer.Option(help="Gigabytes of one weights file, at most.", min=1e-3)
    ] = DEFAULT_OPTIONS.shard_bytes / _GIGABYTE,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Write a model without the attention that a plan drops, for another engine."""
    signal.signal(signal.SIGTERM, _leave)
    with user_errors():
        chosen = _plan(model, plan, drop)
        with progress_bars() as progress:
            export(
                model,
                chosen,
                format_name,
                out,
                options=Options(int(shard_size * _GIGABYTE), gguf_type),
                progress=progress,
                trust_remote_code=trust_remote_code,
            )
    dropped = chosen.dropped()
    mlps = f" and MLPs of {len(dropped.mlps)}" if dropped.mlps else ""
    typer.echo(
        f"exported {served_name(model)} as {format_name} to {out}: attention of "
        f"{len(dropped.attention)}{mlps} of {chosen.model.layers} layers dropped, plan {chosen.id}",
        err=True,
    )


def _plan(model: str, plan: Path | None, drop: str | None) -> Plan:
    found = plan_cache().latest(served_name(model)) if plan is None else read_plan(plan)
    return found if drop is None else found.dropping(drop)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """End as if the program had returned, so that what is half written is removed."""
    raise SystemExit(128 + number)
