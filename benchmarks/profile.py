"""What a decode step's time on a GPU is made of, kernel by kernel, beside the roofline.

    python -m benchmarks.profile --shape llama-3-8b --batch 1 --variant full

Kernels of a replayed CUDA graph are timed one by one; the tracing itself makes the gaps between
them longer, so compare the sum of the kernels with the step time of benchmarks/step.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.inprocess import decode, machine, running
from benchmarks.shapes import device_and_dtype, dropping, random_base
from benchmarks.step import limits_for
from pruning.plan import parse_drop
from pruning.variants import FULL
from server.engine.assembly import EngineConfig

_STEPS = 64
"""Decode steps that are traced; the later half of them is shown."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """All launches of one kernel."""

    name: str
    calls: float
    """A step."""
    microseconds: float
    """A step."""


def main(
    shape: Annotated[str, typer.Option(help="A named shape.")] = "llama-3-8b",
    batch: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8,32",
    variant: Annotated[str, typer.Option(help="full or pruned.")] = FULL,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "50%",
    layers: Annotated[int | None, typer.Option(help="Cut the shape to so many layers.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Profile decode steps."""
    where, weights = device_and_dtype("auto", "auto")
    base = random_base(shape, weights, where, layers)
    variants = dropping(base.layers, parse_drop(drop, layers=base.layers, most=base.layers - 1))
    batches = [int(part) for part in batch.split(",")]
    found: dict[int, list[Kernel]] = {}
    with running(base, variants, EngineConfig(limits_for(max(batches), where, None))) as engine:
        for count in batches:
            decode(engine, {variant: count}, 64, 8)  # records the graph
            # Prompts of few tokens prefill in a step or two, so nearly all of the steps decode.
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                decode(engine, {variant: count}, context, _STEPS)
            found[count] = _decode_kernels(trace)
    for count, kernels in found.items():
        _print(f"{shape} {variant}, batch {count}, context {context}", kernels)
    if output is not None:
        body = {
            "machine": machine(where),
            "kernels": {n: list(map(asdict, k)) for n, k in found.items()},
        }
        output.write_text(json.dumps(body, indent=2) + "\n")


def _decode_kernels(trace: profile) -> list[Kernel]:
    """Return the kernels of the last steps, which all decode."""
    events = trace.events() or ()  # type: ignore[no-untyped-call]
    launches = sorted(
        (event for event in events if str(event.device_type).endswith("CUDA")),
        key=lambda event: event.time_range.start,
    )
    steps = _STEPS // 2
    ends = [place for place, event in enumerate(launches) if "argmax" in event.name.lower()]
    window = launches[ends[-steps - 1] + 1 : ends[-1] + 1]
    return _sum(((e.name, e.time_range.elapsed_us()) for e in window), steps)


def _sum(launches: Iterable[tuple[str, float]], steps: int) -> list[Kernel]:
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for name, microseconds in launches:
        calls[name] += 1
        times[name] += microseconds
    kernels = [Kernel(name, calls[name] / steps, times[name] / steps) for name in calls]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def _print(title: str, kernels: list[Kernel]) -> None:
    whole = sum(kernel.microseconds for kernel in kernels)
    table = Table(title=f"{title}: kernels take {whole / 1e3:.3f} ms a step")
    for heading in ("kernel", "calls", "us", "us a call", "share"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for kernel in kernels[:24]:
        table.add_row(
            kernel.name[:100],
            f"{kernel.calls:.1f}",
            f"{kernel.microseconds:.0f}",
            f"{kernel.microseconds / kernel.calls:.1f}",
            f"{kernel.microseconds / whole:.1%}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
