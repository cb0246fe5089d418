"""Weights in eight bits: how far they are from exact ones, and models and engines that use them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

pytest.importorskip("triton")

from pruning.families import FAMILIES
from pruning.loading import EMBEDDED_MODEL
from pruning.quantised import QuantisationError
from pruning.sublayers import wrap
from server.config import Settings
from server.engine.eight_bits import (
    KINDS,
    EightBitLinear,
    EightBitPart,
    Kind,
    eight_bit_layers,
    eight_bits,
    quantise,
)
from server.engine.scheduler import Limits
from server.startup import SettingsError, start
from tests.engine.eight_bits import round_weights, write_out_by_torch
from tests.engine.tiny_engine import LAYERS, Numbered, fast_engine, recorder, tiny_variants
from tests.pruning.tiny_models import VOCABULARY, tiny_model
from tests.reference.silenced import greedy, silenced

DROPPED: dict[str, set[int]] = {"full": set(), "pruned": {1, 2}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

WAYS: list[tuple[Kind, bool]] = [("int8", False), ("float8", True)]
"""Kinds, and whether they run eagerly."""
if DEVICE == "cuda":
    WAYS += [("int8", True), ("float8", False)]

new = Numbered()


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a wrapped tiny model on the device of the kernels."""
    model = tiny_model(family, layers=LAYERS).to(DEVICE, dtype)  # type: ignore[arg-type]
    wrap(model)
    return model


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


def ids(length: int) -> torch.Tensor:
    return torch.arange(4, 4 + length, device=DEVICE)[None]


def size(model: nn.Module) -> int:
    """Return the bytes of all memory that a model's tensors lie in."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        for storage in [tensor.untyped_storage()]
    }
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_off_by_half_a_step_at_most(kind: Kind) -> None:
    exact = torch.randn(16, 64) * torch.logspace(-6, 3, 16)[:, None]
    exact[5] = 0
    kept = exact.clone()
    found = eight_bits(exact, kind)
    steps = found.scales[:, None].expand_as(exact)
    if kind == "float8":  # three bits of mantissa, and no finer than 2 ** -9
        steps = torch.maximum(exact.abs() / 2**3, steps / 2**9)
    assert ((found.expanded() - exact).abs() <= steps / 2 * (1 + 1e-5)).all()
    assert torch.equal(exact, kept)
    assert found.numbers.dtype.itemsize == 1
    for row in set(range(16)) - {5}:
        largest = exact[row].abs().argmax()
        assert found.expanded()[row, largest] == pytest.approx(float(exact[row, largest]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_computes_with_what_its_bytes_stand_for(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family != "llama":  # one family by the kernel itself
        write_out_by_torch(monkeypatch)
    model, exact = tiny(family), tiny(family)
    quantise(model, "int8")
    layers = eight_bit_layers(model)
    assert len(layers) == LAYERS * 4 + 1  # merged: q, k, v; o; gate, up; down; and the head
    with torch.inference_mode():
        before = exact(ids(9)).logits
        expected = round_weights(exact, "int8")(ids(9)).logits
        got = model(ids(9)).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert 0 < error(got, before) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_kept_in_more_bits(kind: Kind) -> None:
    model = tiny(dtype=torch.bfloat16)
    head = model.get_output_embeddings().weight
    wide = [p.weight for p in model.get_decoder().layers.modules() if type(p) is nn.Linear]
    before, elements = size(model), head.numel() + sum(weight.numel() for weight in wide)
    outputs = len(head) + sum(len(weight) for weight in wide)
    quantise(model, kind)
    assert size(model) == before - 2 * elements + elements + 4 * outputs
    assert sum(layer.step_bytes for layer in eight_bit_layers(model)) == elements + 4 * outputs
    for module in model.modules():
        if isinstance(module, EightBitPart):
            whole = module.whole.numbers.untyped_storage()
            assert module.own.numbers.untyped_storage().data_ptr() == whole.data_ptr()


def test_a_tied_head_gets_bytes_of_its_own() -> None:
    model = tiny()
    embedding = model.get_input_embeddings()
    model.get_output_embeddings().weight = embedding.weight
    kept = embedding.weight.clone()
    quantise(model, "int8")
    head = model.get_output_embeddings()
    assert isinstance(head, EightBitLinear)
    assert head.numbers.shape == (len(VOCABULARY), 32)
    assert torch.equal(model.get_input_embeddings().weight, kept)


def test_biases_are_kept_and_odd_widths_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, exact = tiny("qwen2"), tiny("qwen2")
    for each in (model, exact):
        torch.manual_seed(1)
        for layer in each.get_decoder().layers:
            layer.mlp.down_proj = nn.Linear(64, 40, bias=True, device=DEVICE)
            layer.mlp.narrow = nn.Linear(40, 32, bias=True, device=DEVICE)
    quantise(model, "int8")
    first = model.get_decoder().layers[0]
    assert type(first.mlp.narrow) is nn.Linear
    assert f"{LAYERS} weights stay as they are" in caplog.text
    inputs = torch.randn(3, 64, device=DEVICE)
    expected = exact.get_decoder().layers[0].mlp.down_proj
    assert expected.bias.abs().sum() > 0
    torch.testing.assert_close(first.mlp.down_proj.bias, expected.bias)
    assert error(first.mlp.down_proj(inputs), expected(inputs)) < 0.02


@pytest.mark.parametrize(("kind", "eager"), WAYS)
def test_an_engine_gives_the_tokens_of_the_rounded_model(
    kind: Kind, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where rows are not rounded: with compiled layers on a GPU unless eager."""
    write_out_by_torch(monkeypatch)
    engine = fast_engine(
        tiny_variants(pruned=DROPPED["pruned"]),
        limits=Limits(tokens_per_step=16, running=1),
        weights=kind,
        eager=eager,
    )
    requests = [
        new.request(range(5 + length, 5 + 2 * length), variant, max_tokens=4)
        for length, variant in ((18, "full"), (3, "pruned"))
    ]
    engine.submit(requests)
    for request in requests:
        recorder(request).wait(300)
    engine.stop()
    for request in requests:
        model = round_weights(tiny_model(layers=LAYERS).double(), kind)
        model = silenced(model, DROPPED[request.variant])
        assert recorder(request).tokens == greedy(model, request.prompt, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_are_refused_on_a_cpu(kind: Kind) -> None:
    settings = Settings(model=EMBEDDED_MODEL, device="cpu", quantization=kind)
    with pytest.raises(SettingsError, match=f"{kind} runs on CUDA .* on cpu; .* int4 runs"):
        start(settings, lambda *_: None)


def test_devices_that_the_kernels_do_not_run_on_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("cuda"))
    with pytest.raises(QuantisationError, match=r"int8 needs .* 8\.0 .* has 7\.5"):
        quantise(model, "int8")
    assert not eight_bit_layers(model)
