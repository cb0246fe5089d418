"""Matrix products on a GPU: ours beside cuBLAS and beside the bytes they read.

    python -m benchmarks.products --shape llama-3-8b --rows 1,8,16,32,64,128 --weights bfloat16,int8

The weights of one decoder layer and the head, as a step multiplies by them: q, k and v merged, gate
and up merged with what follows them. The ceiling is a weight's bytes over the copy bandwidth of
this run or, where that takes longer, operations over its matrix rate. Kernels run in a CUDA graph
over as many copies as do not fit the device's cache. cuBLAS multiplies by bfloat16; beside int8
stands torchao's weight-only product, compiled, if that package is there.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.inprocess import machine
from benchmarks.roofline import Ceilings, copies_beyond_cache, graph_seconds, measure_ceilings
from benchmarks.shapes import llama_config
from pruning.families import kv_shape
from server.engine import linear
from server.engine.eight_bits import eight_bits
from server.engine.gated_rows import gate

Weight = TypeVar("Weight")

_TURNS = 3


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
    weights: str
    rows: int
    ours: float
    cublas: float
    """By bfloat16."""
    torchao: float | None
    ceiling: float


def main(
    shape: Annotated[str, typer.Option(help="A named shape.")] = "llama-3-8b",
    rows: Annotated[str, typer.Option(help="Rows that are multiplied.")] = "1,8,16,32,64,128",
    weights: Annotated[str, typer.Option(help="bfloat16, int8, float8.")] = "bfloat16",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure products."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("these kernels need a CUDA device")
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, torch.bfloat16)
    counts = [int(part) for part in rows.split(",")]
    found = [
        row
        for product in _products(shape)
        for count in counts
        for row in _rows(product, count, weights.split(","), ceilings)
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
def _rows(product: Product, rows: int, kinds: Sequence[str], ceilings: Ceilings) -> Iterator[Row]:
    """Yield a row for each kind of weights."""
    elements = product.outputs * product.inputs
    operations = 2 * rows * elements / ceilings.operations_per_second
    weights = [
        torch.randn(product.outputs, product.inputs, dtype=torch.bfloat16, device="cuda") / 64
        for _ in range(copies_beyond_cache(elements))  # in one byte each, too
    ]
    x = torch.randn(rows, product.inputs, dtype=torch.bfloat16, device="cuda")
    plain = _gated if product.gated else functional.linear
    for kind in kinds:
        itemsize = 2 if kind == "bfloat16" else 1
        ours, cublas = _in_turns(
            _ours(x, weights, kind, product.gated),
            lambda index: plain(x, weights[index]),
            copies=len(weights),
        )
        yield Row(
            name=product.name,
            weights=kind,
            rows=rows,
            ours=ours,
            cublas=cublas,
            torchao=_torchao(x, weights, product.gated) if kind == "int8" else None,
            ceiling=max(elements * itemsize / ceilings.copy_bytes_per_second, operations) * 1e6,
        )


def _ours(x: Tensor, weights: Sequence[Tensor], kind: str, gated: bool) -> Callable[[int], Tensor]:
    """Return what multiplies by one of the weights, put into a kind."""
    way: Callable[..., Tensor] = linear.gated if gated else _linear
    if kind == "bfloat16":
        return lambda index: way(x, weights[index])
    bits = [eight_bits(weight, kind) for weight in weights]  # type: ignore[arg-type]
    return lambda index: way(x, bits[index].numbers, bits[index].scales)


def _torchao(x: Tensor, weights: Sequence[Tensor], gated: bool) -> float | None:
    """Return the microseconds of a compiled product by torchao's int8 weights, if it is there."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
        layers.append(layer)
    torch.compiler.reset()  # which compiles no more after some shapes
    product = torch.compile(_silu_gated if gated else functional.linear, dynamic=False)
    return _microseconds(lambda layer: product(x, layer.weight), layers)


def _silu_gated(x: Tensor, weight: Any) -> Tensor:
    gate, up = functional.linear(x, weight).chunk(2, dim=-1)
    return functional.silu(gate) * up


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return linear.linear(x, weight, None, scale)


def _gated(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `linear.gated` does where cuBLAS computes the product."""
    return gate(functional.linear(x, weight))


def _in_turns(*works: Callable[[int], object], copies: int) -> list[float]:
    """Return microseconds of each, medians of turns: a busy device becomes slower with time."""
    turns = [[graph_seconds(work, copies) * 1e6 for work in works] for _ in range(_TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def _microseconds(work: Callable[[Weight], object], weights: Sequence[Weight]) -> float:
    return graph_seconds(lambda index: work(weights[index]), len(weights)) * 1e6


def _table(shape: str, rows: list[Row]) -> Table:
    table = Table(title=f"{shape}, microseconds a product")
    names = ["weight", "in", "rows", "ceiling", "ours", "of ceiling", "cuBLAS", "cuBLAS over ours"]
    peers = any(row.torchao is not None for row in rows)
    for name in [*names, *(["torchao", "torchao over ours"] if peers else [])]:
        table.add_column(name, justify="right")
    for row in rows:
        peer = ["", ""] if row.torchao is None else _beside(row.torchao, row.ours)
        table.add_row(
            row.name,
            row.weights,
            str(row.rows),
            f"{row.ceiling:.1f}",
            f"{row.ours:.1f}",
            f"{row.ours / row.ceiling:.2f}x",
            *_beside(row.cublas, row.ours),
            *(peer if peers else []),
        )
    return table


def _beside(peer: float, ours: float) -> list[str]:
    return [f"{peer:.1f}", f"{peer / ours:.2f}x"]


if __name__ == "__main__":
    typer.run(main)
