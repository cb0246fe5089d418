"""The roofline's counts against those of a real model: its parameters, and the products it runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from benchmarks.roofline import (
    Ceilings,
    Floor,
    Rows,
    floor,
    measure_ceilings,
    parameters,
    step_bytes,
    step_operations,
)
from benchmarks.shapes import SHAPES, dropping, llama_config, random_base, random_model
from pruning.sublayers import last_rows, rows_attending

CPU = torch.device("cpu")
ROWS = 24
END = torch.tensor([ROWS - 1])
CEILINGS = Ceilings(100.0, 200.0, 50.0)


def tiny_config() -> LlamaConfig:
    return llama_config("tiny")


def test_parameters_are_those_of_the_model() -> None:
    counts, layers = parameters(tiny_config()), SHAPES["tiny"].layers
    model = random_model("tiny", torch.float32, CPU)
    of_model = {name: weight.numel() for name, weight in model.named_parameters()}
    embedding = of_model.pop("model.embed_tokens.weight")
    assert layers * (counts.attention + counts.mlp) + counts.head == sum(of_model.values())
    assert counts.embedding_row * SHAPES["tiny"].vocabulary == embedding


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("llama-2-7b", 6.738), ("llama-2-13b", 13.016), ("llama-3-8b", 8.030)],
)
def test_shapes_have_the_public_parameter_counts(shape: str, billions: float) -> None:
    config = llama_config(shape)
    counts, embedding = parameters(config), config.vocab_size * config.hidden_size
    layers = config.num_hidden_layers * (counts.attention + counts.mlp)
    assert (layers + counts.head + embedding) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_smollm2_has_its_public_count_with_the_embedding_as_its_head() -> None:
    config = llama_config("smollm2-135m")
    counts = parameters(config)
    total = config.num_hidden_layers * (counts.attention + counts.mlp) + counts.head
    assert total / 1e6 == pytest.approx(134.5, abs=0.05)


@pytest.mark.parametrize("dropped", [0, 1, 3])
def test_operations_are_the_products_that_the_model_runs(dropped: int) -> None:
    base = random_base("tiny", torch.float32, CPU)
    kept = dropping(base.layers, dropped)["pruned"].kept
    rows = rows_attending(base.layers, ROWS, frozenset(range(base.layers)) - kept)
    tokens = torch.arange(ROWS)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base.model(tokens, attending_rows=rows, last=last_rows(rows, None, ROWS, END))
    products = counter.get_flop_counts()["Global"]
    counted = sum(products.get(each, 0) for each in (torch.ops.aten.mm, torch.ops.aten.bmm))
    shape, pairs = SHAPES["tiny"], ROWS * (ROWS + 1) // 2
    attention = 4 * shape.width * pairs * len(kept)
    work = [Rows(1, ROWS, 0, len(kept))]
    assert step_operations(tiny_config(), work) == counted + attention


def test_a_decode_step_reads_weights_once_and_each_requests_context() -> None:
    config, shape = tiny_config(), SHAPES["tiny"]
    counts = parameters(config)
    full, pruned = Rows(3, 1, 100, 4), Rows(5, 1, 200, 2)
    weights = 4 * (counts.attention + counts.mlp) + counts.head + 8 * shape.width
    kv_per_layer = 2 * shape.kv_heads * (shape.width // shape.heads)
    keys_and_values = kv_per_layer * (3 * 4 * (100 + 1) + 5 * 2 * (200 + 1))
    assert step_bytes(config, 2, [full, pruned]) == 2 * (weights + keys_and_values)


def test_keys_and_values_in_eight_bits_are_half_of_those_in_sixteen() -> None:
    config, work = tiny_config(), [Rows(3, 1, 100, 4)]
    weights = step_bytes(config, 2, [Rows(3, 1, -1, 4)])
    wide, narrow = step_bytes(config, 2, work), step_bytes(config, 2, work, 1)
    assert wide - weights == 2 * (narrow - weights) > 0


def test_attention_weights_count_only_where_some_row_attends() -> None:
    config = tiny_config()
    both = step_bytes(config, 2, [Rows(1, 1, 0, 4), Rows(1, 1, 0, 2)])
    pruned = step_bytes(config, 2, [Rows(0, 1, 0, 4), Rows(2, 1, 0, 2)])
    kv_per_layer = 2 * 2 * SHAPES["tiny"].kv_heads * 16
    assert both - pruned == 2 * (2 * parameters(config).attention) + 2 * kv_per_layer


def test_chunks_of_a_prompt_compute_as_much_as_the_whole() -> None:
    config = tiny_config()
    counts = parameters(config)
    row_at_the_end = 2 * (counts.head_matrix + counts.mlp_matrices)
    whole = step_operations(config, [Rows(1, 64, 0, 4)])
    chunks = [Rows(1, 40, 0, 4), Rows(1, 24, 40, 4)]
    assert sum(step_operations(config, [chunk]) for chunk in chunks) - row_at_the_end == whole


def test_the_floor_is_what_binds() -> None:
    assert Floor(bytes=1000, operations=10).seconds(CEILINGS) == 10
    assert Floor(bytes=1000, operations=10).seconds_by_read(CEILINGS) == 5
    assert Floor(bytes=10, operations=1000).seconds(CEILINGS) == 20


def test_the_known_roofline_of_llama_3_8b() -> None:
    """Copy 4.24 TB/s and 790 TFLOP/s give 3.61 ms for one request at 2200 tokens, 3.26 ms with half
    of the attention dropped, and 1203 ms for 32 prompts of 2048 tokens, if all of their rows go
    through the last MLP: 29 ms of it."""
    config, h200 = llama_config("llama-3-8b"), Ceilings(4.24e12, 4.24e12, 790e12)
    full, half, prefill = Rows(1, 1, 2200, 32), Rows(1, 1, 2200, 16), Rows(32, 2048, 0, 32)
    assert floor(config, 2, [full]).seconds(h200) == pytest.approx(3.61e-3, rel=5e-3)
    assert floor(config, 2, [half]).seconds(h200) == pytest.approx(3.26e-3, rel=5e-3)
    assert floor(config, 2, [prefill]).seconds(h200) == pytest.approx(1.174, rel=1e-3)


def test_ceilings_are_measured() -> None:
    ceilings = measure_ceilings(CPU, torch.float32, repeats=1)
    assert ceilings.copy_bytes_per_second > 1e8
    assert ceilings.read_bytes_per_second > 1e8
    assert ceilings.operations_per_second > 1e9
