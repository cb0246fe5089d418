"""Forward passes as one native call against the model's own, number by number."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.loading import BaseModel
from pruning.quantised import EightBitSubstitute, quantise, runs_here
from pruning.substitutes import LinearSubstitute
from pruning.variants import FULL, Variant, Variants
from server.engine.ahead import CompiledLayers
from server.engine.assembly import EngineConfig, build_engine
from server.engine.forward import Forward, Output, plain_form
from server.engine.native import CHUNK_DIM, MAP_ROWS, NativeFunctions
from server.engine.norms import use_native_norm
from server.engine.request import FinishReason
from server.engine.scheduler import Limits
from tests.engine.test_ahead import with_native_functions
from tests.engine.tiny_engine import LAYERS, Numbered, recorder, wrapped
from tests.pruning.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(
    not runs_here(torch.device("cpu")), reason="the functions need AVX-512"
)

CONTEXT = 128
EVERY = frozenset(range(LAYERS))
DROPPED: dict[str, tuple[set[int], set[int]]] = {
    FULL: (set(), set()),
    "pruned": ({1, 3}, set()),
    "block": ({1, 3}, {2}),
}
"""Attention and MLPs."""
REPLACED = 3
"""A layer whose dropped attention has a substitute."""
MODELS = {"qwen2": 4 * CHUNK_DIM, "mistral": 64}
"""Their widths: of heads that may be attended in chunks, and of others, which see a window."""

new = Numbered()


@dataclass(frozen=True, slots=True)
class Compiled:
    """A folder of compiled functions, and for which model."""

    folder: Path
    family: str


@pytest.fixture(scope="module", params=MODELS)
def compiled(
    request: pytest.FixtureRequest,
    native_of_this_processor: NativeFunctions,
    native_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiled:
    if not native_of_this_processor.has_four_bits:
        pytest.skip("products in four bits are not native here")
    folder = with_native_functions(tmp_path_factory.mktemp("compiled"), native_folder)
    CompiledLayers(four_bit_base(request.param).model, folder).compile_missing()
    return Compiled(folder, request.param)


def four_bit_base(family: str) -> BaseModel:
    """Return a model that has a substitute."""
    width = MODELS[family]
    base = wrapped(tiny_model(family, layers=LAYERS, width=width))
    quantise(base.model)
    substitute = LinearSubstitute(torch.randn(width, width) / width, torch.randn(width))
    base.sublayers[REPLACED].substitute = EightBitSubstitute(substitute.bfloat16())
    return base


class Both:
    """Computes every step by a forward pass, and again by the model itself."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.native: list[int] = []
        """Rows of each step that was one native call."""
        self.others: list[int] = []

    def __call__(self, tokens: torch.Tensor, **named: Any) -> Any:
        got = self.forward(tokens, **named)
        expected = self.forward._model(tokens, **named)
        steps = self.native if isinstance(got, Output) else self.others
        steps.append(tokens.shape[1])
        assert torch.equal(got.logits, expected.logits)
        return expected


def variants(*names: str) -> Variants:
    chosen = [
        Variant(name, EVERY - DROPPED[name][0], frozenset(DROPPED[name][1])) for name in names
    ]
    return Variants(LAYERS, chosen)


def steps_of(compiled: Compiled, offered: Variants, running: int) -> Both:
    """Let requests of all variants run, up to so many together, and return how they did."""
    config = EngineConfig(
        Limits(tokens_per_step=40, running=running),
        kv_cache_bytes=1 << 22,
        compiled=compiled.folder,
    )
    engine = build_engine(four_bit_base(compiled.family), offered, config)
    both = engine._runner._model = Both(engine._runner._model)
    requests = [
        new.request(range(4, 6 + i), variant.name, max_tokens=20, **params)
        for i in range(0, running + 4, 2)
        for variant in offered
        for params in ({}, {"prompt_logprobs": 1})
    ]
    engine.start()
    engine.submit(requests)
    for request in requests:
        assert recorder(request).wait(240).reason is FinishReason.LENGTH
    engine.stop()
    return both


@pytest.mark.parametrize(
    "names", [(FULL,), (FULL, "pruned"), tuple(DROPPED)], ids=["full", "two", "and MLPs"]
)
def test_steps_are_the_models_own(compiled: Compiled, names: tuple[str, ...]) -> None:
    both = steps_of(compiled, variants(*names), running=6)
    assert both.native.count(6) > 12
    assert min(both.native) < 6, "requests end"
    assert max(both.native + both.others) > 6, "with prompts"
    if compiled.family == "mistral":
        assert max(both.native) <= 6, "chunks of such heads are not attended by native code"


def test_more_rows_than_are_mapped_run_by_the_model(compiled: Compiled) -> None:
    running = 2 * MAP_ROWS + 4
    both = steps_of(compiled, variants(FULL, "pruned"), running)
    assert both.native
    assert max(both.others) >= running


def test_layers_are_told_of_once_they_are_compiled(
    compiled: Compiled, tmp_path: Path, native_folder: Path
) -> None:
    told: list[int] = []
    layers = CompiledLayers(
        four_bit_base(compiled.family).model, with_native_functions(tmp_path, native_folder)
    )
    assert layers.missing == 1
    without_native = shutil.ignore_patterns("native*")  # which are loaded from there
    shutil.copytree(compiled.folder, tmp_path, dirs_exist_ok=True, ignore=without_native)
    layers.compile_in_background(lambda few_rows: told.append(len(few_rows))).join()
    layers.complete(lambda few_rows: told.append(len(few_rows)))
    assert told == [LAYERS, LAYERS]


def test_what_does_not_exist_is_an_error(compiled: Compiled) -> None:
    config = EngineConfig(kv_cache_bytes=1 << 22, compiled=compiled.folder)
    engine = build_engine(four_bit_base(compiled.family), variants(FULL), config)
    native = engine._runner._model._pass
    for token, position in ((-1, 0), (100_000, 0), (5, CONTEXT), (5, -1)):
        row = (torch.tensor([[token]]), torch.tensor([[position]]))
        with pytest.raises(RuntimeError, match="does not exist"):
            native(*row, (1,) * LAYERS, None, torch.tensor([0]))


PLAIN = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2"]
OTHERS = ["gemma2", "gemma3_text", "olmo3", "granite"]


@pytest.fixture
def model(request: pytest.FixtureRequest, native_of_this_processor: NativeFunctions) -> Any:
    base = wrapped(tiny_model(request.param).bfloat16())
    use_native_norm(base.model, native_of_this_processor)
    return base.model


@pytest.mark.parametrize("model", PLAIN, indirect=True)
@torch.inference_mode()
def test_rotary_tables_are_the_models(model: Any) -> None:
    form = plain_form(model, CONTEXT)
    assert form is not None
    hidden = form.embedding[:1]
    for first, last in ((0, 1), (7, 40), (CONTEXT - 1, CONTEXT)):
        cos, sin = model.get_decoder().rotary_emb(hidden, torch.arange(first, last)[None])
        assert torch.equal(form.cosines[first:last], cos[0])
        assert torch.equal(form.sines[first:last], sin[0])


@pytest.mark.parametrize("model", OTHERS, indirect=True)
def test_models_that_do_more_have_no_plain_form(model: Any) -> None:
    assert plain_form(model, CONTEXT) is None


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_model_that_changes_its_logits_has_none(model: Any) -> None:
    model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits * 2))
    assert plain_form(model, CONTEXT) is None
