"""The paper's own setting, and the same load in a KV pool that binds.

    python -m benchmarks.paper --shape llama-2-13b --drop 0,25%,50% --json out.json
    python -m benchmarks.paper --shape llama-2-13b --binding --kv-memory 20GiB

He et al. (arXiv 2406.15786) generate 2048 tokens after prompts of 2048, in batches as large as
memory allows, and print the speed-up of dropping attention over the full model at the same batch.
Here the batch is what the page pool holds of `full`. Beside each speed-up stand the paper's and
the roofline's: the least time for the prompts and for every step, by ceilings of this run.

With --binding every variant runs the same number of requests and has as many in flight as the
pool holds of it, so that half of the keys and values means twice the batch.

Random weights: times are those of the real ones, texts are not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from benchmarks.inprocess import DoesNotFitError, Running, Served, machine, running, serve
from benchmarks.roofline import Ceilings, Rows, floor, measure_ceilings
from benchmarks.shapes import SHAPES, device_and_dtype, dropping_each, random_base
from benchmarks.step import describe, limits_for, times
from pruning.loading import BaseModel
from pruning.plan import parse_drop
from pruning.variants import FULL, Variants
from server.config import parse_bytes
from server.engine.assembly import EngineConfig, KvCacheDtype, kv_dtype

PRINTED: Mapping[tuple[str, int], float] = {
    ("llama-2-13b", 8): 1.13,
    ("llama-2-13b", 16): 1.29,
    ("llama-2-13b", 20): 1.40,
    ("llama-3-8b", 8): 1.16,
    ("llama-3-8b", 16): 1.38,
}
"""The paper's speed-ups, by shape and number of layers without attention."""


_HEADINGS = (
    "dropped",
    "in flight",
    "requests",
    "output tokens/s",
    "over full",
    "paper",
    "roofline over full",
    "step ms",
    "step over full",
    "time / roofline",
    "KV GB",
    "KV of full",
    "preemptions",
)
_MOST_RUNNING = 512
"""Requests in flight at most, however many the pool holds."""
_PAGE_TOKENS = 32
"""Requests are counted as if they filled pages of this many tokens."""
_WARM_UP_PROMPT, _WARM_UP_GENERATED = 32, 4


@dataclass(frozen=True, slots=True)
class Work:
    """What every request is, and how many there are."""

    prompt: int
    generated: int
    batch: int | None
    """Requests at once; None takes what the pool holds of `full`."""
    requests: int | None
    """With a binding pool: how many in all; None takes four times what it holds of `full`."""
    binding: bool
    """Whether each variant has as many in flight as the pool holds of it."""

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated


@dataclass(frozen=True, slots=True)
class Run:
    """One variant's run of the load."""

    served: Served
    in_flight: int
    attention_layers: int

    def requests(self, work: Work) -> int:
        return self.served.output_tokens // work.generated


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least times of one model on one device."""

    base: BaseModel
    kv_dtype: torch.dtype
    ceilings: Ceilings

    def seconds(self, run: Run, work: Work) -> float:
        """Return those of a run: all prompts, then waves of steps at the mean context."""
        requests = run.requests(work)
        at_once = min(requests, run.in_flight)
        prompts = Rows(requests, work.prompt, 0, run.attention_layers)
        step = Rows(at_once, 1, work.prompt + work.generated / 2, run.attention_layers)
        steps = (work.generated - 1) * requests / at_once
        return self._step_seconds(prompts) + steps * self._step_seconds(step)

    def _step_seconds(self, rows: Rows) -> float:
        config, itemsize = self.base.model.config, self.base.model.dtype.itemsize
        assert isinstance(config, LlamaConfig)
        return floor(config, itemsize, [rows], self.kv_dtype.itemsize).seconds(self.ceilings)


@dataclass(frozen=True, slots=True)
class Row:
    """One variant's figures, beside those of `full`, the paper and the roofline."""

    dropped: int
    requests: int
    in_flight: int
    seconds: float
    tokens_per_second: float
    """Generated tokens over the whole run, prompts included in its time."""
    step_seconds: float
    """Median between consecutive tokens of a request."""
    kv_bytes: int
    """The most that pages in use came to."""
    preemptions: int
    speed_up: float
    """tokens_per_second over that of `full`."""
    step_speed_up: float
    """Step of `full` over this one, each at its own batch."""
    kv_of_full: float
    roofline_ratio: float
    """Seconds over the least seconds."""
    roofline_speed_up: float
    """What speed_up would be if every run took its least time."""
    printed: float | None
    """The paper's speed-up, where it prints one."""


def main(
    shape: Annotated[str, typer.Option(help="A named shape.")] = "llama-2-13b",
    drop: Annotated[str, typer.Option(help="Layers or shares; 0 is always run.")] = "0,25%,50%",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 2048,
    generated: Annotated[int, typer.Option(min=2, help="Generated tokens.")] = 2048,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests at once; by default what the pool holds.")
    ] = None,
    binding: Annotated[bool, typer.Option("--binding", help="Each takes what fits it.")] = False,
    requests: Annotated[
        int | None, typer.Option(min=1, help="With --binding: how many in all.")
    ] = None,
    kv_memory: Annotated[str | None, typer.Option(help="Page pool, such as 20GiB.")] = None,
    kv_share: Annotated[
        float | None, typer.Option(help="Page pool as a share of the free device memory.")
    ] = None,
    kv_cache_dtype: Annotated[KvCacheDtype, typer.Option(help="As of the server.")] = "auto",
    layers: Annotated[int | None, typer.Option(help="Cut the shape to so many layers.")] = None,
    max_tokens_per_step: Annotated[
        int | None, typer.Option(help="By default what suits the device.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Without CUDA graphs.")] = False,
    device: str = "auto",
    dtype: str = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure the paper's setting."""
    try:
        work = _work(prompt, generated, batch, requests, binding=binding)
        where, weights = device_and_dtype(device, dtype)
        ceilings = measure_ceilings(where, weights)
        base = random_base(shape, weights, where, layers)
        counts = _counts(drop, base.layers)
        variants = dropping_each(base.layers, {f"drop{n}": n for n in counts})
        limits = limits_for(batch or _MOST_RUNNING, where, max_tokens_per_step)
        pool = _pool_bytes(parse_bytes(kv_memory), kv_share, where)
        config = EngineConfig(limits, pool, enforce_eager=eager, kv_cache_dtype=kv_cache_dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        rows = measure(base, variants, config, work, ceilings)
    except DoesNotFitError as error:
        raise typer.BadParameter(str(error)) from error
    title = (
        f"{shape} ({base.layers} layers), random weights, {weights}, KV cache {kv_cache_dtype}, on "
        f"{machine(where)['device']}: {prompt} prompt and {generated} generated tokens a request"
    )
    _print(title, rows, ceilings, base.layers)
    if output is not None:
        body = {
            "setting": {"title": title, "binding": binding, "pool_bytes": pool, "eager": eager}
            | {"kv_cache_dtype": kv_cache_dtype},
            "machine": machine(where),
            "ceilings": asdict(ceilings),
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(body, indent=2) + "\n")


def measure(
    base: BaseModel,
    variants: Variants,
    config: EngineConfig,
    work: Work,
    ceilings: Ceilings,
) -> list[Row]:
    """Run the load by each variant, `full` first, on one engine.

    Raises:
        DoesNotFitError: the pool holds less than is to be in flight.
    """
    runs: dict[str, Run] = {}
    with running(base, variants, config) as engine:
        for variant in variants:
            in_flight = _in_flight(engine, variant.name, work)
            count = work.requests or (4 * _in_flight(engine, FULL, work) if work.binding else None)
            served = _serve(engine, variant.name, count or in_flight, in_flight, work)
            runs[variant.name] = Run(served, in_flight, len(variant.kept))
            Console(stderr=True).print(f"measured {variant.name}", style="dim")
    roofline = Roofline(base, kv_dtype(config.kv_cache_dtype, base.model.dtype), ceilings)
    return [_row(roofline, run, runs[FULL], work) for run in runs.values()]


def _in_flight(engine: Running, variant: str, work: Work) -> int:
    """Return how many requests of a variant run together.

    Raises:
        DoesNotFitError: the pool does not hold that many, or none.
    """
    pages_full = -(-work.tokens // _PAGE_TOKENS) * _PAGE_TOKENS
    held = min(engine.limits.running, engine.capacity(variant) // pages_full)
    held_of_full = min(engine.limits.running, engine.capacity(FULL) // pages_full)
    wanted = held if work.binding else (work.batch or held_of_full)
    if not 1 <= wanted <= held:
        raise DoesNotFitError(
            f"{wanted} requests of {work.tokens} tokens by {variant}, and the page pool holds "
            f"{held}; shorten --prompt and --generated, lower --batch or raise --kv-memory"
        )
    return wanted


def _serve(engine: Running, variant: str, requests: int, in_flight: int, work: Work) -> Served:
    """Serve the load, after a short one that meets this batch for the first time."""
    serve(engine, variant, in_flight, _WARM_UP_PROMPT, _WARM_UP_GENERATED, in_flight)
    return serve(engine, variant, requests, work.prompt, work.generated, in_flight)


def _row(roofline: Roofline, run: Run, full: Run, work: Work) -> Row:
    base, served, least = roofline.base, run.served, roofline.seconds(run, work)
    least_full = roofline.seconds(full, work)
    dropped = base.layers - run.attention_layers
    paper_shape = base.layers == SHAPES[base.name].layers
    return Row(
        dropped=dropped,
        requests=run.requests(work),
        in_flight=run.in_flight,
        seconds=served.seconds,
        tokens_per_second=served.tokens_per_second,
        step_seconds=served.step_seconds,
        kv_bytes=served.peak_kv_bytes,
        preemptions=served.preemptions,
        speed_up=served.tokens_per_second / full.served.tokens_per_second,
        step_speed_up=full.served.step_seconds / served.step_seconds,
        kv_of_full=served.peak_kv_bytes / full.served.peak_kv_bytes,
        roofline_ratio=served.seconds / least,
        roofline_speed_up=least_full / least,
        printed=PRINTED.get((base.name, dropped)) if paper_shape and not work.binding else None,
    )


def _work(
    prompt: int, generated: int, batch: int | None, requests: int | None, *, binding: bool
) -> Work:
    """Return what is to be done.

    Raises:
        ValueError: an option that means nothing in this mode.
    """
    if binding and batch is not None:
        raise ValueError("--batch has no meaning with --binding: the pool decides; use --requests")
    if not binding and requests is not None:
        raise ValueError("--requests needs --binding; without it one --batch is run")
    return Work(prompt, generated, batch, requests, binding)


def _counts(drop: str, layers: int) -> list[int]:
    """Return the numbers of layers to drop, without 0, which is `full`."""
    counts = {parse_drop(part, layers=layers, most=layers - 1) for part in drop.split(",")}
    return sorted(counts - {0})


def _pool_bytes(memory: int | None, share: float | None, device: torch.device) -> int | None:
    """Return the bytes of page pool, None for what an engine takes by itself.

    Raises:
        ValueError: two sizes, a share of nothing, or a share of a CPU's memory.
    """
    if share is None:
        return memory
    if memory is not None:
        raise ValueError("give --kv-memory or --kv-share, not both")
    if device.type != "cuda" or not 0 < share <= 1:
        raise ValueError(f"--kv-share {share} must be in (0, 1], on a GPU; else use --kv-memory")
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * share)


def _print(title: str, rows: Sequence[Row], ceilings: Ceilings, layers: int) -> None:
    console = Console(width=160 if not sys.stdout.isatty() else None)
    console.print(title)
    console.print(describe(ceilings))
    table = Table()
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.dropped} of {layers}",
            str(row.in_flight),
            str(row.requests),
            f"{row.tokens_per_second:,.1f}",
            times(row.speed_up),
            times(row.printed) or "-",
            times(row.roofline_speed_up),
            f"{row.step_seconds * 1e3:.2f}",
            times(row.step_speed_up),
            times(row.roofline_ratio),
            f"{row.kv_bytes / 1e9:.3f}",
            times(row.kv_of_full),
            str(row.preemptions),
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
