"""What each precision costs in quality and gives in speed and bytes.

    python -m benchmarks.quantised --text TEXT.txt
    python -m benchmarks.quantised --shape llama-3-8b --batch 1,8,32,64,128 --context 2048

Perplexity, KL(first || mode) and top-1 agreement are over next tokens of the same text; the first
mode, float32 unless said otherwise, is what the others are compared with. Weights in few bits are
used as decoding does, for all of the text: int4 by torch's kernels, int4-compiled by native
functions where there are any, as one to three requests are. `int4-prompts` and `float8-prompts` are
as prompts are computed, with the rows in eight bits as well: on a CPU by native functions, as more
requests that decode together are too, in float8 on a GPU.

Decode speed is that of the engine in this process, at --context tokens. With --shape, weights are
random and only speed is measured, beside the least time: the bytes that a step reads over the copy
bandwidth of this run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.inprocess import (
    COMPILED,
    Running,
    decode,
    machine,
    passing,
    prefill,
    running,
)
from benchmarks.peers import free_memory
from benchmarks.predictions import Quality, compared
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.shapes import device_and_dtype, random_base
from benchmarks.step import limits_for
from pruning.calibration import calibrate
from pruning.loading import DTYPES, EMBEDDED_MODEL, BaseModel, load_base_model
from pruning.quantised import (
    EightBitHead,
    QuantisedProduct,
    eight_bit_product,
    four_bit_layers,
    four_bit_product,
    quantise,
)
from pruning.variants import FULL, Variant, Variants
from server.engine.assembly import EngineConfig
from server.engine.native import EXACT_ROWS, FOUR_BIT_OUTPUTS, native_functions

INT4_COMPILED, INT4_PROMPTS = "int4-compiled", "int4-prompts"
"""int4 as served once the layers are compiled; quality is that of uncompiled layers by the native
functions."""
PROMPTS = "float8-prompts"
MODES = {
    "cpu": ("float32", "bfloat16", "int4", INT4_COMPILED, INT4_PROMPTS),
    "cuda": ("float32", "bfloat16", "int8", "float8", PROMPTS),
}
"""The first is the reference."""
_QUALITY_ONLY = ("float32", PROMPTS, INT4_PROMPTS)
"""Not measured where quality is not."""
_EIGHT_BITS = {"int8": "int8", "float8": "float8", PROMPTS: "float8"}
_CPU_POOL = 1 << 29
"""Bytes; a GPU's pool is what it is when serving."""
_WARM_UP_CONTEXT, _WARM_UP_STEPS = 32, 8


@dataclass(frozen=True, slots=True)
class Speed:
    """What is measured of an engine."""

    batches: Sequence[int]
    context: int
    prompt: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Row:
    """One precision."""

    mode: str
    quality: Quality | None
    """None where weights are random."""
    weight_bytes: int
    """Of the weights that a decode step of one row reads."""
    kv_bytes_per_token: int
    tokens_per_second: dict[int, float]
    """By requests that decode together."""
    over_roofline: dict[int, float]
    """A step over its least time, by requests; empty where no ceiling was measured."""
    prefill_tokens_per_second: float


def main(
    text: Annotated[
        str | None, typer.Option(help="Text to measure on: a file, self, or hf:NAME.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead: speed of a named shape, random weights.")
    ] = None,
    model: Annotated[str, typer.Option(help="What to measure.")] = EMBEDDED_MODEL,
    modes: Annotated[
        str | None, typer.Option(help="Precisions; the first is the reference.")
    ] = None,
    windows: int = 8,
    length: int = 512,
    batch: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8",
    context: int = 64,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is prefilled.")] = 512,
    repeats: int = 3,
    device: Annotated[str, typer.Option(help="auto: cuda if there is one.")] = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure precisions."""
    if (text is None) == (shape is None):
        raise typer.BadParameter("give --text to measure quality, or --shape to measure speed only")
    where, _ = device_and_dtype(device, "auto")
    known = MODES.get(where.type, ())
    usual = known if shape is None else tuple(mode for mode in known if mode not in _QUALITY_ONLY)
    names = usual if modes is None else tuple(modes.split(","))
    if unknown := sorted(set(names) - set(known)):
        raise typer.BadParameter(f"on {where.type} there is no {', '.join(unknown)}")
    speed = Speed([int(part) for part in batch.split(",")], context, prompt, repeats)
    if shape is not None:
        ceilings = measure_ceilings(where, torch.bfloat16)
        rows = of_shape(shape, names, where, speed, ceilings)
        cells = [_speed_cells(row, size, rows[0]) for row in rows for size in speed.batches]
    else:
        assert text is not None
        rows = _of_model(model, names, where, speed, text, windows, length)
        cells = [_quality_cells(row, rows[0]) for row in rows]
    _print(cells, f"precisions of {shape or model} on {machine(where)['device']}")
    if output is not None:
        body = {"machine": machine(where), "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(body, indent=2) + "\n")


def of_shape(
    shape: str, modes: Sequence[str], device: torch.device, speed: Speed, ceilings: Ceilings
) -> list[Row]:
    """Measure the speed of random weights."""
    rows = []
    for mode in track(modes, description="measuring"):
        base = passing(partial(random_base, shape, DTYPES[_dtype(mode)], device))
        passing(partial(_put_into, mode, base))
        rows.append(_row(mode, base, None, speed, ceilings))
        del base
        free_memory()
    return rows


def _of_model(
    model: str,
    modes: Sequence[str],
    device: torch.device,
    speed: Speed,
    text: str,
    windows: int,
    length: int,
) -> list[Row]:
    """Measure quality and speed of a model's own weights."""
    rows: list[Row] = []
    tokens, exact = torch.empty(0), list[Tensor]()
    for mode in track(modes, description="measuring"):
        base = passing(partial(_loaded, model, mode, device))
        if not rows:
            tokens = passing(partial(_tokens, text, base, windows, length))
            exact = passing(partial(_predictions, base, tokens))
        quality = passing(partial(_quality, mode, base, tokens, exact))
        rows.append(_row(mode, base, quality, speed, None))
        del base
        free_memory()
    return rows


def _tokens(text: str, base: BaseModel, windows: int, length: int) -> Tensor:
    """Return [windows, length] tokens on the model's device."""
    found = calibrate(text, base, samples=windows, length=length, seed=1)
    return found.token_ids.to(base.device)


def _predictions(base: BaseModel, tokens: Tensor) -> list[Tensor]:
    return [_logprobs(base, window) for window in tokens]


def _loaded(model: str, mode: str, device: torch.device) -> BaseModel:
    base = load_base_model(model, dtype=_dtype(mode), device=str(device))
    _put_into(mode, base)
    return base


def _dtype(mode: str) -> str:
    """Return the dtype of a mode's other weights, or, on a CPU, of those it is made from."""
    return "float32" if mode.startswith("int4") else "bfloat16" if mode in _EIGHT_BITS else mode


def _put_into(mode: str, base: BaseModel) -> None:
    """Put a model's weights into the few bits of a mode."""
    if mode.startswith("int4"):
        quantise(base.model)
    if mode in _EIGHT_BITS:
        from server.engine import eight_bits  # Triton exists on GPU machines only

        eight_bits.quantise(base.model, _EIGHT_BITS[mode])  # type: ignore[arg-type]


@torch.inference_mode()
def _logprobs(base: BaseModel, window: Tensor) -> Tensor:
    """Return [length - 1, vocabulary] log probabilities of the next tokens."""
    return torch.log_softmax(base.model(window[None]).logits[0, :-1].float(), dim=-1)


def _quality(mode: str, base: BaseModel, tokens: Tensor, exact: list[Tensor]) -> Quality:
    """Compare predictions with the reference's."""
    return compared(tokens, exact, (_decoded_logprobs(mode, base, window) for window in tokens))


def _decoded_logprobs(mode: str, base: BaseModel, window: Tensor) -> Tensor:
    with _as_decoding(mode, base, len(window)):
        return _logprobs(base, window)


@contextmanager
def _as_decoding(mode: str, base: BaseModel, rows: int) -> Iterator[None]:
    """Let many rows be multiplied as few are, unless they are prompts: four bits by their kernel,
    no rows in float8."""
    if mode.startswith("int4"):
        _compute_by(base, _four_bit_product(mode), rows)
        yield
        _compute_by(base, four_bit_product, 0)
    elif mode == "float8":
        with patch("server.engine.many_rows.multiplies", lambda *_: False):
            yield
    else:
        yield


def _four_bit_product(mode: str) -> QuantisedProduct:
    native = None if mode == "int4" else native_functions(COMPILED)
    if native is None or not native.has_four_bits:
        return four_bit_product
    if mode == INT4_PROMPTS:
        return native.four_bit_product
    few = native.four_bit_product

    def product(inputs: Tensor, *weight: Tensor) -> Tensor:
        return torch.cat([few(some, *weight) for some in torch.split(inputs, EXACT_ROWS)])

    return product


def _compute_by(base: BaseModel, product: QuantisedProduct, rows: int) -> None:
    """Compute up to `rows` rows in few bits, those of layers by `product` if they have the outputs
    that native functions take."""
    for linear in four_bit_layers(base.model):
        is_taken = linear.out_features % FOUR_BIT_OUTPUTS == 0
        linear.compute_by(product if is_taken else four_bit_product, rows)
    head = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if isinstance(head, EightBitHead):
        head.compute_by(eight_bit_product, rows)


def _row(
    mode: str,
    base: BaseModel,
    quality: Quality | None,
    speed: Speed,
    ceilings: Ceilings | None,
) -> Row:
    variants = Variants(base.layers, [Variant(FULL, frozenset(range(base.layers)))])
    weight_bytes = _weight_bytes(base)
    pool = _CPU_POOL if base.device.type == "cpu" else None
    limits = limits_for(max(speed.batches), base.device, None)
    compiled = COMPILED if mode in (INT4_COMPILED, INT4_PROMPTS) else None
    config = EngineConfig(limits, pool, compiled=compiled)
    with running(base, variants, config) as engine:
        steps = {size: _decoded(engine, size, speed) for size in speed.batches}
        chunk = statistics.median(
            prefill(engine, {FULL: 1}, speed.prompt).seconds for _ in range(speed.repeats + 1)
        )
        per_token = engine.engine.describe()[0].kv_bytes_per_token
    least = {
        size: (weight_bytes + size * tokens * per_token) / ceilings.copy_bytes_per_second
        for size, (_, tokens) in steps.items()
        if ceilings is not None
    }
    return Row(
        mode=mode,
        quality=quality,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        tokens_per_second={size: size / seconds for size, (seconds, _) in steps.items()},
        over_roofline={size: steps[size][0] / seconds for size, seconds in least.items()},
        prefill_tokens_per_second=speed.prompt / chunk,
    )


def _decoded(engine: Running, size: int, speed: Speed) -> tuple[float, float]:
    """Return the median seconds of a step and the tokens whose keys and values it reads or writes,
    of each request."""
    mix = {FULL: size}
    decode(engine, mix, _WARM_UP_CONTEXT, _WARM_UP_STEPS)
    runs = [decode(engine, mix, speed.context, 32) for _ in range(speed.repeats)]
    median = sorted(runs, key=lambda run: run.step_seconds)[len(runs) // 2]
    return median.step_seconds, median.contexts[FULL] + 1


def _weight_bytes(base: BaseModel) -> int:
    """Return the bytes of the decoder layers' weights and the head, as a step of one row reads."""
    model: Any = base.model
    head, layers = model.get_output_embeddings(), model.get_decoder().layers
    total = sum(parameter.nbytes for parameter in layers.parameters())
    total += sum(linear.step_bytes for linear in four_bit_layers(model))
    if base.device.type == "cuda":
        from server.engine.eight_bits import EightBitLinear, eight_bit_layers

        total += sum(linear.step_bytes for linear in eight_bit_layers(model))
        return int(total + (0 if isinstance(head, EightBitLinear) else head.weight.nbytes))
    return int(total + (head.step_bytes if isinstance(head, EightBitHead) else head.weight.nbytes))


def _print(cells: Sequence[Mapping[str, str]], title: str) -> None:
    """Print rows of cells by their headings."""
    table = Table(title=title)
    for name in cells[0]:
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in cells:
        table.add_row(*row.values())
    Console(width=150).print(table)


def _quality_cells(row: Row, first: Row) -> Mapping[str, str]:
    assert row.quality is not None
    assert first.quality is not None
    return {
        "mode": row.mode,
        "perplexity": f"{row.quality.perplexity:.3f}",
        "ratio": f"{row.quality.perplexity / first.quality.perplexity:.4f}",
        "KL nats": f"{row.quality.kl:.5f}",
        "agreement": f"{row.quality.agreement:.4f}",
        "weights MB": f"{row.weight_bytes / 1e6:.0f}",
        "KV B/token": f"{row.kv_bytes_per_token:,}",
        **{f"tokens/s at {size}": f"{rate:.1f}" for size, rate in row.tokens_per_second.items()},
        "prefill tokens/s": f"{row.prefill_tokens_per_second:.0f}",
    }


def _speed_cells(row: Row, size: int, first: Row) -> Mapping[str, str]:
    """Return a row for each number of requests, beside the first mode and the least time."""
    rate, prefill_rate = row.tokens_per_second[size], row.prefill_tokens_per_second
    return {
        "mode": row.mode,
        "weights MB": f"{row.weight_bytes / 1e6:.0f}",
        "requests": str(size),
        "ms a step": f"{1e3 * size / rate:.2f}",
        "of least time": f"{row.over_roofline[size]:.2f}x",
        "tokens/s": f"{rate:.1f}",
        f"over {first.mode}": f"{rate / first.tokens_per_second[size]:.2f}x",
        "prefill tokens/s": f"{prefill_rate:.0f}",
        f"prefill over {first.mode}": f"{prefill_rate / first.prefill_tokens_per_second:.2f}x",
    }


if __name__ == "__main__":
    typer.run(main)
