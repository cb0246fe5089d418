"""Matrix products of few rows on a GPU: ours beside cuBLAS and beside the bytes they read.

    python -m benchmarks.products --shape llama-3-8b --rows 1,8,16,32,64,128

The weights of one decoder layer and the head, as a step multiplies by them: q, k and v merged, gate
and up merged with what follows them. The ceiling is a weight's bytes over the copy bandwidth of
this run. Kernels run in a CUDA graph over as many copies as do not fit the device's cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benchmarks.inprocess import machine
from benchmarks.roofline import copies_beyond_cache, graph_seconds, measure_ceilings
from benchmarks.shapes import llama_config
from pruning.families import kv_shape
from server.engine import linear


@dataclass(frozen=True, slots=True)
class Product:
    """A weight [outputs, inputs] and what becomes of its product."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of one product."""

    name: str
    rows: int
    ours: float
    cublas: float
    ceiling: float


def main(
    shape: Annotated[str, typer.Option(help="A named shape.")] = "llama-3-8b",
    rows: Annotated[str, typer.Option(help="Rows that are multiplied.")] = "1,8,16,32,64,128",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure products."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("these kernels need a CUDA device")
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, torch.bfloat16)
    counts = [int(part) for part in rows.split(",")]
    found = [
        _row(product, count, ceilings.copy_bytes_per_second)
        for product in _products(shape)
        for count in counts
    ]
    Console(width=160).print(_table(shape, found))
    if output is not None:
        body = {
            "machine": machine(device),
            "ceilings": asdict(ceilings),
            "products": [asdict(row) for row in found],
        }
        output.write_text(json.dumps(body, indent=2) + "\n")


def _products(shape: str) -> list[Product]:
    config = llama_config(shape)
    heads, width = kv_shape(config), config.hidden_size
    queries = config.num_attention_heads * heads.head_dim
    return [
        Product("qkv", queries + 2 * heads.kv_heads * heads.head_dim, width),
        Product("o", width, queries),
        Product("gate, up", 2 * config.intermediate_size, width, gated=True),
        Product("down", width, config.intermediate_size),
        Product("head", config.vocab_size, width),
    ]


@torch.inference_mode()
def _row(product: Product, rows: int, bytes_per_second: float) -> Row:
    size = product.outputs * product.inputs * 2
    weights = [
        torch.randn(product.outputs, product.inputs, dtype=torch.bfloat16, device="cuda") / 64
        for _ in range(copies_beyond_cache(size))
    ]
    x = torch.randn(rows, product.inputs, dtype=torch.bfloat16, device="cuda")
    ways: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    ways = (linear.gated, _gated) if product.gated else (_linear, functional.linear)
    return Row(
        name=product.name,
        rows=rows,
        ours=_microseconds(lambda weight: ways[0](x, weight), weights),
        cublas=_microseconds(lambda weight: ways[1](x, weight), weights),
        ceiling=size / bytes_per_second * 1e6,
    )


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return linear.linear(x, weight, None)  # type: ignore[no-any-return]


def _gated(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `linear.gated` does where cuBLAS computes the product."""
    return linear.gate(functional.linear(x, weight))


def _microseconds(work: Callable[[Tensor], object], weights: list[Tensor]) -> float:
    return graph_seconds(lambda index: work(weights[index]), len(weights)) * 1e6


def _table(shape: str, rows: list[Row]) -> Table:
    table = Table(title=f"{shape}, microseconds a product")
    for name in ("weight", "rows", "ceiling", "ours", "of ceiling", "cuBLAS", "cuBLAS over ours"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.rows),
            f"{row.ceiling:.1f}",
            f"{row.ours:.1f}",
            f"{row.ours / row.ceiling:.2f}x",
            f"{row.cublas:.1f}",
            f"{row.cublas / row.ours:.2f}x",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
