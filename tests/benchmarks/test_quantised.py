"""The precision benchmark's bookkeeping on a tiny shape. No figure is held against a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.quantised import Row, Speed, _decoded_logprobs, of_shape
from benchmarks.roofline import Ceilings, parameters
from benchmarks.shapes import llama_config
from pruning.quantised import four_bit_layers, quantise, runs_here
from server.engine.native import FOUR_BIT_OUTPUTS
from tests.engine.tiny_engine import wrapped
from tests.pruning.tiny_models import tiny_model

CEILINGS = Ceilings(1e10, 2e10, 1e11)
SPEED = Speed(batches=(1, 2), context=24, prompt=32, repeats=1)
COUNTS = parameters(llama_config("tiny"))
LAYERS = 4
MATRICES = LAYERS * (COUNTS.attention_matrices + COUNTS.mlp_matrices) + COUNTS.head_matrix
NORMS = LAYERS * (COUNTS.attention + COUNTS.mlp) + COUNTS.head_matrix - MATRICES


def measured(modes: Sequence[str], device: str) -> list[Row]:
    rows = of_shape("tiny", modes, torch.device(device), SPEED, CEILINGS)
    assert [row.mode for row in rows] == list(modes)
    for row in rows:
        assert row.quality is None
        assert row.prefill_tokens_per_second > 0
        for size, rate in row.tokens_per_second.items():
            least_seconds = size / rate / row.over_roofline[size]
            kv_bytes = least_seconds * CEILINGS.copy_bytes_per_second - row.weight_bytes
            tokens = kv_bytes / row.kv_bytes_per_token / size
            assert 24 < tokens < 40  # the context, and what is decoded meanwhile
    return rows


def test_every_precision_reads_its_own_bytes() -> None:
    exact, half, four = measured(("float32", "bfloat16", "int4"), "cpu")
    assert exact.weight_bytes == 4 * (MATRICES + NORMS)
    assert half.weight_bytes == 2 * (MATRICES + NORMS)
    assert 0.5 * MATRICES < four.weight_bytes < half.weight_bytes / 2
    assert exact.kv_bytes_per_token == 2 * half.kv_bytes_per_token == 2 * four.kv_bytes_per_token


@pytest.mark.skipif(not runs_here(torch.device("cpu")), reason="needs AVX-512")
def test_native_functions_predict_as_torchs_kernels_do_whatever_the_outputs(
    native_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quantised.COMPILED", native_folder)
    base = wrapped(tiny_model("qwen2", layers=LAYERS, width=32))
    quantise(base.model)
    taken = {linear.out_features % FOUR_BIT_OUTPUTS == 0 for linear in four_bit_layers(base.model)}
    assert False in taken
    window = torch.arange(4, 24)
    by_torch, native = (_decoded_logprobs(mode, base, window) for mode in ("int4", "int4-compiled"))
    assert (native - by_torch).norm() < 0.05 * by_torch.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_eight_bits_are_one_byte_a_weight_and_a_scale_an_output() -> None:
    half, eight = measured(("bfloat16", "int8"), "cuda")
    config = llama_config("tiny")
    kv_width = config.num_key_value_heads * config.head_dim
    outputs = LAYERS * (3 * config.hidden_size + 2 * kv_width + 2 * config.intermediate_size)
    outputs += config.vocab_size
    assert half.weight_bytes == 2 * (MATRICES + NORMS)
    assert eight.weight_bytes == MATRICES + 4 * outputs + 2 * NORMS
