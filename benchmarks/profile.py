"""What a step's time on a GPU is made of, kernel by kernel: decode steps, and prefill of prompts.

    python -m benchmarks.profile --shape llama-3-8b --batch 1 --prefill 1x2048 --variant full

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
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.inprocess import Mix, Running, decode, machine, prefill, running
from benchmarks.shapes import device_and_dtype, dropping, random_base
from benchmarks.step import limits_for, parse_prefills
from pruning.plan import parse_drop
from pruning.variants import FULL
from server.engine.assembly import EngineConfig

_STEPS = 64
"""Decode steps that are traced; the later half of them is shown."""
_PREFILLS = 4
"""Prefills that are traced."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """All launches of one kernel."""

    name: str
    calls: float
    """A step, or a prefill."""
    microseconds: float
    """A step, or a prefill."""


def main(
    shape: Annotated[str, typer.Option(help="A named shape.")] = "llama-3-8b",
    batch: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8,32",
    prefills: Annotated[
        str, typer.Option("--prefill", help="Prompts x tokens, or nothing.")
    ] = "1x2048",
    variant: Annotated[str, typer.Option(help="full or pruned.")] = FULL,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    drop: Annotated[str, typer.Option(help="What `pruned` drops.")] = "50%",
    layers: Annotated[int | None, typer.Option(help="Cut the shape to so many layers.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Profile decode steps and prefills."""
    where, weights = device_and_dtype("auto", "auto")
    base = random_base(shape, weights, where, layers)
    variants = dropping(base.layers, parse_drop(drop, layers=base.layers, most=base.layers - 1))
    batches = [int(part) for part in batch.split(",") if part]
    prompts = parse_prefills(prefills)
    most = max([*batches, *(count for count, _ in prompts)], default=1)
    found: dict[str, list[Kernel]] = {}
    with running(base, variants, EngineConfig(limits_for(most, where, None))) as engine:
        for count in batches:
            title = f"decode step, batch {count}, context {context}"
            found[title] = _of_decode(engine, {variant: count}, context)
        for count, tokens in prompts:
            title = f"prefill, {count} prompts of {tokens} tokens"
            found[title] = _of_prefill(engine, {variant: count}, tokens)
    for title, kernels in found.items():
        _print(f"{shape} {variant}, {title}", kernels)
    if output is not None:
        body = {
            "machine": machine(where),
            "kernels": {title: list(map(asdict, k)) for title, k in found.items()},
        }
        output.write_text(json.dumps(body, indent=2) + "\n")


def _of_decode(engine: Running, mix: Mix, context: int) -> list[Kernel]:
    """Return the kernels of a decode step, the mean of the last ones."""
    decode(engine, mix, 64, 8)  # records the graph
    # Prompts of few tokens prefill in a step or two, so nearly all of the steps decode.
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        decode(engine, mix, context, _STEPS)
    launches, steps = _launches(trace), _STEPS // 2
    ends = [place for place, event in enumerate(launches) if "argmax" in event.name.lower()]
    return _sum(launches[ends[-steps - 1] + 1 : ends[-1] + 1], steps)


def _of_prefill(engine: Running, mix: Mix, tokens: int) -> list[Kernel]:
    """Return the kernels of a prefill, all steps that it takes together."""
    prefill(engine, mix, tokens)  # compiles
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(_PREFILLS):
            prefill(engine, mix, tokens)
    return _sum(_launches(trace), _PREFILLS)


def _launches(trace: profile) -> list[FunctionEvent]:
    """Return what ran on the device, in order."""
    events = trace.events() or ()  # type: ignore[no-untyped-call]
    on_device = (event for event in events if str(event.device_type).endswith("CUDA"))
    return sorted(on_device, key=lambda event: event.time_range.start)


def _sum(launches: Iterable[FunctionEvent], times_over: int) -> list[Kernel]:
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for event in launches:
        calls[event.name] += 1
        times[event.name] += event.time_range.end - event.time_range.start
    kernels = [Kernel(name, calls[name] / times_over, times[name] / times_over) for name in calls]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def _print(title: str, kernels: list[Kernel]) -> None:
    whole = sum(kernel.microseconds for kernel in kernels)
    table = Table(title=f"{title}: kernels take {whole / 1e3:.3f} ms")
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
