"""Seconds from starting the server to its first answer, with an empty and with a filled cache.

    python -m benchmarks.startup --repeats 3

The packages are installed already; what the first start adds is the conversion of the GGUF file
and the plan. Each cold start has a cache folder of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.inprocess import machine
from benchmarks.server import running_server

BARS = {"cold": 60.0, "warm": 10.0}


@dataclass(frozen=True, slots=True)
class Row:
    """Starts of one kind."""

    cache: str
    seconds: float
    """Median."""
    bar: float


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure starts."""
    cold, warm = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ATTNDROP_CACHE_DIR"] = folder
            cold.append(_first_answer())
            warm.append(_first_answer())
    rows = [
        Row(name, statistics.median(seconds), BARS[name])
        for name, seconds in (("cold", cold), ("warm", warm))
    ]
    table = Table(title="from start to first answer")
    for heading in ("cache", "seconds", "bar"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in rows:
        table.add_row(row.cache, f"{row.seconds:.1f}", f"{row.bar:.0f}")
    Console().print(table)
    if output is not None:
        body = {"machine": machine(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


def _first_answer() -> float:
    start = time.perf_counter()
    with running_server(None, []) as url:
        body = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
