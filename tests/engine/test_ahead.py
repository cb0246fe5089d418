"""Layers compiled ahead of time against the same layers uncompiled."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pruning.loading import BaseModel
from pruning.quantised import FEW_ROWS, EightBitSubstitute, quantise
from pruning.sublayers import last_rows
from pruning.substitutes import LinearSubstitute
from server.engine.ahead import FEW, CompiledLayers, _compute_any_rows, row_ranges
from server.engine.native import FOUR_BIT_OUTPUTS
from tests.engine.tiny_engine import LAYERS, wrapped
from tests.pruning.tiny_models import tiny_model

WIDTHS = [32, FOUR_BIT_OUTPUTS]
"""Of models without and with native products."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A folder of compiled functions."""

    folder: Path
    width: int
    """Of the model that they were made for."""
    most: int
    """Rows up to which those of few rows hold."""
    hold_more: bool
    """Whether there are functions for more rows."""

    @property
    def steps(self) -> list[tuple[int, list[int]]]:
        """Rows, and those that attend in each layer."""
        more = self.most + 1
        return [
            (1, [1] * LAYERS),
            (5, [5, 0, 5, 0]),
            (self.most, [self.most, 2, self.most, 0]),
            (more, [more] * LAYERS),
            (2 * more, [2 * more, more, more, 0]),
        ]


def four_bit_base(width: int = WIDTHS[0]) -> BaseModel:
    base = wrapped(tiny_model("qwen2", layers=LAYERS, width=width))
    quantise(base.model)
    return base


def logits(
    base: BaseModel, rows: int, attending: Sequence[int], wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the logits of the wanted rows, None: all. Where all are, none ends before."""
    with torch.inference_mode():
        output = base.model(
            torch.arange(4, 4 + rows)[None],
            position_ids=torch.arange(rows)[None],
            attending_rows=attending,
            last=last_rows(attending, None, rows, wanted),
        )
    return output.logits.double()


def with_native_functions(folder: Path, native_folder: Path) -> Path:
    """Return a folder that holds native functions, if there are any, and no compiled ones."""
    for library in native_folder.glob("*.so"):
        shutil.copy(library, folder)
    return folder


@pytest.fixture(scope="module", params=WIDTHS)
def compiled(
    request: pytest.FixtureRequest,
    native_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiled:
    """Functions, made once: compiling takes half a minute."""
    folder = with_native_functions(tmp_path_factory.mktemp("compiled"), native_folder)
    base = four_bit_base(request.param)
    layers = CompiledLayers(base.model, folder)
    assert layers.missing == 1, "all layers of the model have one form"
    layers.compile_missing()
    assert layers.missing == 0
    few, *many = row_ranges(base.model.get_decoder().layers[0], layers.native)  # type: ignore[no-untyped-call]
    has_products = layers.native is not None and layers.native.has_four_bits
    assert few.last == (FEW if has_products and request.param > 32 else FEW_ROWS)
    return Compiled(folder, request.param, few.last, bool(many))


def test_compiled_layers_are_as_exact_as_uncompiled_ones(compiled: Compiled) -> None:
    eager, by_functions = four_bit_base(compiled.width), four_bit_base(compiled.width)
    layers = CompiledLayers(by_functions.model, compiled.folder)
    assert layers.missing == 0
    _compute_any_rows(eager.model, layers.native)
    exact = wrapped(tiny_model("qwen2", layers=LAYERS, width=compiled.width))
    for rows, attending in compiled.steps:
        plain, got = logits(eager, rows, attending), logits(by_functions, rows, attending)
        expected = logits(exact, rows, attending)
        assert (got - expected).norm() < 1.1 * (plain - expected).norm()
        assert (got - plain).norm() < 0.05 * plain.norm(), "beyond what bfloat16 rounds"
        if rows > 2:  # which the last MLPs, of few rows, compute after attention of many
            wanted = torch.tensor([rows - 1, 0])
            some = logits(by_functions, rows, attending, wanted)
            assert (some - got[:, wanted]).norm() < 0.05 * got[:, wanted].norm()
        is_compiled = compiled.hold_more or rows <= compiled.most
        assert is_compiled != torch.equal(got, plain), "other rows run uncompiled"


def test_other_numbers_in_a_layer_are_another_form(compiled: Compiled) -> None:
    base = four_bit_base(compiled.width)
    base.model.get_decoder().layers[1].mlp.norm.variance_epsilon = 0.5  # type: ignore[no-untyped-call]
    assert CompiledLayers(base.model, compiled.folder).missing == 1


def test_a_substitute_is_no_other_form(compiled: Compiled) -> None:
    base = four_bit_base(compiled.width)
    width = int(base.model.config.hidden_size)
    substitute = LinearSubstitute(torch.eye(width), torch.ones(width)).bfloat16()
    base.sublayers[1].substitute = substitute
    base.sublayers[2].substitute = EightBitSubstitute(substitute)
    assert CompiledLayers(base.model, compiled.folder).missing == 0


def test_a_model_can_be_compiled_once_more(
    compiled: Compiled, native_folder: Path, tmp_path: Path
) -> None:
    """As for another engine in the same process, when native functions compute its products."""
    elsewhere = with_native_functions(tmp_path, native_folder)
    base = four_bit_base(compiled.width)
    assert CompiledLayers(base.model, compiled.folder).missing == 0
    assert CompiledLayers(base.model, compiled.folder).missing == 0
    assert CompiledLayers(base.model, elsewhere).missing == 1


def test_without_a_compiler_layers_stay_as_they_are(
    native_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing compiled before"))
    base, plain = four_bit_base(), four_bit_base()
    layers = CompiledLayers(base.model, with_native_functions(tmp_path, native_folder))
    _compute_any_rows(plain.model, layers.native)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        layers.compile_in_background().join()
    assert layers.missing == 1
    assert "layers run uncompiled" in caplog.text
    for rows, attending in Compiled(tmp_path, WIDTHS[0], FEW_ROWS, False).steps:
        assert torch.equal(logits(base, rows, attending), logits(plain, rows, attending))
