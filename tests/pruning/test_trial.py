"""Divergences with reused prefixes against plain transformers that compute everything anew."""

from __future__ import annotations

import pytest
import torch

from pruning import head
from pruning.divergence import DivergenceError, Quality
from pruning.families import FAMILIES
from pruning.residuals import Residuals
from pruning.trial import Trial
from tests.pruning.tiny_models import VOCABULARY, tiny_base, tiny_model
from tests.reference.divergence import Cost, cost
from tests.reference.silenced import silenced

LAYERS = 5


def tokens(samples: int = 11, length: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(4, 80, (samples, length), generator=generator)


def assert_equal(got: Quality, expected: Cost) -> None:
    assert got.kl == pytest.approx(expected.kl, abs=2e-6)
    assert got.agreement == expected.agreement
    assert got.perplexity == pytest.approx(expected.perplexity, rel=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_way_of_dropping_equals_plain_transformers(family: str, monkeypatch) -> None:
    monkeypatch.setitem(head._LOGITS, "cpu", 50 * len(VOCABULARY))  # several slices of rows
    plain = tiny_model(family, layers=LAYERS)
    trial = Trial(tiny_base(family, layers=LAYERS), tokens())

    def expected(*dropped: int) -> Cost:
        return cost(plain, silenced(plain, dropped), tokens())

    assert trial.baseline.tokens == 11 * 16
    assert trial.baseline.perplexity == pytest.approx(expected().perplexity, rel=1e-5)
    assert_equal(trial.quality(), expected())
    trial.drop({3: None})
    tried = trial.without_each({1: None, 2: None, 4: None})
    for layer, quality in tried.items():
        assert_equal(quality, expected(3, layer))
    assert min(quality.kl for quality in tried.values()) > 1e-3, "the test is blind"
    trial.drop({4: None, 1: None})
    assert_equal(trial.quality(), expected(1, 3, 4))


def test_a_substitute_of_the_base_model_plays_no_part() -> None:
    base = tiny_base(layers=LAYERS)
    base.sublayers[2].substitute = torch.nn.Linear(32, 32)
    trial = Trial(base, tokens())
    trial.drop({2: None})
    plain = tiny_model(layers=LAYERS)
    assert_equal(trial.quality(), cost(plain, silenced(plain, [2]), tokens()))


def test_what_a_sublayer_maps_is_its_normed_input_to_what_it_adds() -> None:
    base = tiny_base("granite", layers=LAYERS)
    residuals = Residuals(base, tokens(3))
    plain = tiny_model("granite", layers=LAYERS)
    seen: dict[str, torch.Tensor] = {}
    attention = plain.model.layers[2].self_attn
    attention.register_forward_hook(
        lambda _, args, named, out: seen.update(x=named["hidden_states"], y=out[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        plain(tokens(3))
    ((normed, output),) = residuals.sublayer_pairs(2)
    torch.testing.assert_close(normed, seen["x"].flatten(0, 1))
    torch.testing.assert_close(output, seen["y"].flatten(0, 1))


def test_logits_that_are_not_finite_are_refused() -> None:
    base = tiny_base(layers=LAYERS)
    base.model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(DivergenceError, match="not finite in float32; load the model with"):
        Trial(base, tokens(2))
