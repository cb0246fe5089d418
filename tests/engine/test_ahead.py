"""Layers compiled ahead of time against the same layers uncompiled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pruning.loading import BaseModel
from pruning.quantised import EightBitSubstitute, quantise
from pruning.substitutes import LinearSubstitute
from server.engine.ahead import MOST_ROWS, CompiledLayers
from tests.engine.tiny_engine import LAYERS, wrapped
from tests.pruning.tiny_models import tiny_model

STEPS: list[tuple[int, list[int]]] = [
    (1, [1] * LAYERS),
    (5, [5, 0, 5, 0]),
    (MOST_ROWS, [MOST_ROWS, 2, MOST_ROWS, 0]),
    (MOST_ROWS + 1, [MOST_ROWS + 1] * LAYERS),
]


def four_bit_base() -> BaseModel:
    base = wrapped(tiny_model("qwen2", layers=LAYERS))
    quantise(base.model)
    return base


def logits(base: BaseModel, rows: int, attending: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        output = base.model(
            torch.arange(4, 4 + rows)[None],
            position_ids=torch.arange(rows)[None],
            attending_rows=attending,
        )
    return output.logits.double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled functions, made once: compiling takes half a minute."""
    folder = tmp_path_factory.mktemp("compiled")
    layers = CompiledLayers(four_bit_base().model, folder)
    assert layers.missing == 1, "all layers of the model have one form"
    layers.compile_missing()
    assert layers.missing == 0
    return folder


def test_compiled_layers_are_as_exact_as_uncompiled_ones(folder: Path) -> None:
    eager, compiled = four_bit_base(), four_bit_base()
    assert CompiledLayers(compiled.model, folder).missing == 0
    exact = wrapped(tiny_model("qwen2", layers=LAYERS))
    for rows, attending in STEPS:
        plain, got = logits(eager, rows, attending), logits(compiled, rows, attending)
        expected = logits(exact, rows, attending)
        assert (got - expected).norm() < 1.1 * (plain - expected).norm()
        assert (got - plain).norm() < 0.05 * plain.norm(), "beyond what bfloat16 rounds"
        assert (rows > MOST_ROWS) == torch.equal(got, plain), "more rows run uncompiled"


def test_other_numbers_in_a_layer_are_another_form(folder: Path) -> None:
    base = four_bit_base()
    base.model.get_decoder().layers[1].mlp.norm.variance_epsilon = 0.5  # type: ignore[no-untyped-call]
    assert CompiledLayers(base.model, folder).missing == 1


def test_a_substitute_is_no_other_form(folder: Path) -> None:
    base = four_bit_base()
    width = int(base.model.config.hidden_size)
    substitute = LinearSubstitute(torch.eye(width), torch.ones(width)).bfloat16()
    base.sublayers[1].substitute = substitute
    base.sublayers[2].substitute = EightBitSubstitute(substitute)
    assert CompiledLayers(base.model, folder).missing == 0


def test_without_a_compiler_layers_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing compiled before"))
    base = four_bit_base()
    layers = CompiledLayers(base.model, tmp_path)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        layers.compile_in_background().join()
    assert layers.missing == 1
    assert "layers run uncompiled" in caplog.text
    for rows, attending in STEPS:
        assert torch.equal(logits(base, rows, attending), logits(four_bit_base(), rows, attending))
