"""The score against an independent computation on the unwrapped model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning.calibration import calibrate
from pruning.importance import ImportanceError, measure_importance
from pruning.loading import BaseModel
from tests.pruning.tiny_models import VOCABULARY, tiny_base, tiny_model


def random_set(samples: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, len(VOCABULARY), (samples, length), generator=generator)


def independent_importance(
    model: PreTrainedModel, table: torch.Tensor, attention_output: str
) -> list[float]:
    """One sample at a time, on plain transformers modules: X enters the decoder layer, and
    `attention_output` is the module whose output transformers adds to X."""
    layers = model.model.layers
    entering: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: entering.append((args or [kwargs["hidden_states"]])[0]),
            with_kwargs=True,
        )
        layer.get_submodule(attention_output).register_forward_hook(
            lambda _, __, out: added.append(out[0] if isinstance(out, tuple) else out)
        )
    for row in table:
        with torch.no_grad():
            model(row[None], use_cache=False)
    cosines = [[] for _ in layers]
    for index, (x, delta) in enumerate(zip(entering, added, strict=True)):
        layer = index % len(layers)
        y = x.double() + getattr(layers[layer], "residual_multiplier", 1.0) * delta.double()
        cosines[layer].append(functional.cosine_similarity(x.double(), y, dim=-1).mean())
    return [1.0 - torch.stack(each).mean().item() for each in cosines]


@pytest.mark.parametrize(
    ("family", "attention_output"),
    [("llama", "self_attn"), ("gemma2", "post_attention_layernorm"), ("granite", "self_attn")],
)
def test_equals_an_independent_computation(family, attention_output):
    data = random_set(5, 17)
    expected = independent_importance(tiny_model(family), data, attention_output)
    measured = measure_importance(tiny_base(family), data, batch_size=2)
    assert min(expected) > 1e-4
    assert measured == pytest.approx(expected, abs=1e-6)


def test_the_embedded_model_equals_an_independent_computation(base):
    data = calibrate("self", base, samples=4, length=32).token_ids
    plain = AutoModelForCausalLM.from_pretrained(
        base.model.config.name_or_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = independent_importance(plain, data, "self_attn")
    assert measure_importance(base, data) == pytest.approx(expected, abs=1e-4)


def test_batch_size_does_not_matter():
    base, data = tiny_base(), random_set(7, 9)
    assert measure_importance(base, data, batch_size=7) == pytest.approx(
        measure_importance(base, data, batch_size=3), abs=1e-7
    )


def test_a_sublayer_that_adds_nothing_has_no_importance():
    base = tiny_base()
    base.sublayers[2].attention.o_proj.weight.data.zero_()
    scores = measure_importance(base, random_set(2, 9))
    assert scores[2] == pytest.approx(0.0, abs=1e-6)
    assert min(scores[:2]) > 1e-3


def hooks(base: BaseModel) -> int:
    return sum(len(sublayer._forward_hooks) for sublayer in base.sublayers)


def test_hooks_are_gone_afterwards_even_when_the_pass_fails():
    base = tiny_base()
    measure_importance(base, random_set(2, 9))
    assert hooks(base) == 0
    outside = torch.full((2, 9), len(VOCABULARY))
    with pytest.raises(IndexError):
        measure_importance(base, outside)
    assert hooks(base) == 0


def test_the_model_is_left_as_it_was():
    base, data = tiny_base(), random_set(2, 9)
    before = copy.deepcopy(base.model.state_dict())
    measure_importance(base, data)
    assert all(torch.equal(before[name], now) for name, now in base.model.state_dict().items())


def test_a_score_that_is_not_finite_is_refused():
    base = tiny_base()
    base.sublayers[1].attention.o_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ImportanceError, match=r"layers \[1, 2, 3\] is not finite in float32"):
        measure_importance(base, random_set(2, 9))


def test_progress_counts_samples():
    seen: list[tuple[str, int, int]] = []
    measure_importance(
        tiny_base(), random_set(5, 9), batch_size=2, progress=lambda *x: seen.append(x)
    )
    assert seen == [("measuring importance", done, 5) for done in (2, 4, 5)]
