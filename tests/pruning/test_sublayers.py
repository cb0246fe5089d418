"""Wrapped models against plain transformers, for every family in the table."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from pruning.attention import CausalAttention, GrowingAttention
from pruning.families import FAMILIES, UnknownFamilyError, context_limit, family_of
from pruning.sublayers import last_rows, rows_attending, wrap
from tests.pruning.tiny_models import tiny_model
from tests.reference.silenced import silenced

LAYERS = 4


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The families' own code rounds norms and softmax to float32; beyond that, nothing differs."""
    assert (got - expected).norm() / expected.norm() < 1e-6


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4, 80, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("dropped", [set(), {2}, {1, 2, 3}], ids=["none", "one", "all but 0"])
def test_dropping_equals_plain_transformers(family: str, dropped: set[int]) -> None:
    plain = tiny_model(family, layers=LAYERS).double()
    expected = silenced(plain, dropped)(tokens(2, 17)).logits
    wrap(plain)
    got = plain(tokens(2, 17), attending_rows=rows_attending(LAYERS, 17, dropped)).logits
    assert_equal(got, expected)
    if dropped:
        full = plain(tokens(2, 17)).logits
        assert (full - got).abs().max() > 1e-3, "dropping changed nothing: the test is blind"


@torch.no_grad()
def test_rows_beyond_the_prefix_pass_through(family: str) -> None:
    """Two sequences packed in one row dimension: the first keeps what the second drops."""
    plain = tiny_model(family, layers=LAYERS).double()
    first, second = tokens(2, 9)[:, None]
    expected = torch.cat([plain(first).logits, silenced(plain, {1, 3})(second).logits], dim=1)
    wrap(plain)
    got = plain(
        torch.cat([first, second], dim=1),
        position_ids=torch.arange(9).repeat(2)[None],
        attending_rows=[18, 9, 18, 9],
        attend=TwoSequences(),
    ).logits
    assert_equal(got, expected)


class TwoSequences:
    """Attends rows 0 to 8 and rows 9 to 17 apart, each with the dense cache's arithmetic."""

    def __call__(self, layer, query, key, value, form):  # type: ignore[no-untyped-def]
        parts = [slice(start, start + 9) for start in range(0, query.shape[2], 9)]
        return torch.cat(
            [
                GrowingAttention()(layer, query[:, :, p], key[:, :, p], value[:, :, p], form)
                for p in parts
            ],
            dim=1,
        )


@torch.no_grad()
def test_growing_attention_equals_whole_sequences(family: str) -> None:
    model = tiny_model(family, layers=LAYERS).double()
    wrap(model)
    whole = model(tokens(2, 12)).logits
    cache = GrowingAttention()
    grown = []
    for start, end in [(0, 5), (5, 6), (6, 12)]:
        positions = torch.arange(start, end)[None].expand(2, -1)
        part = model(tokens(2, 12)[:, start:end], position_ids=positions, attend=cache)
        grown.append(part.logits)
    assert_equal(torch.cat(grown, dim=1), whole)


@torch.no_grad()
def test_a_layer_without_attending_rows_runs_nothing() -> None:
    model = tiny_model(layers=LAYERS)
    sublayers = wrap(model)
    calls: list[int] = []
    for layer in sublayers:
        for part in (layer.norm, layer.attention):
            part.register_forward_hook(lambda *_, index=layer.index: calls.append(index))
    model(tokens(1, 5), attending_rows=rows_attending(LAYERS, 5, {1, 2}))
    assert calls == [0, 0, 3, 3]


@torch.no_grad()
@pytest.mark.parametrize("dropped", [set(), {3}, {2, 3}, {1, 2}], ids=str)
def test_rows_without_logits_end_where_nothing_attends_any_more(
    family: str, dropped: set[int]
) -> None:
    model = tiny_model(family, layers=LAYERS).double()
    sublayers = wrap(model)
    for layer in sublayers:  # as where a dropped sublayer has a substitute
        layer.substitute = lambda normed: 0.1 * normed
    attending = rows_attending(LAYERS, 11, dropped)
    expected = model(tokens(1, 11), attending_rows=attending).logits
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    rows = torch.tensor([10, 3])
    last = last_rows(attending, None, 11, rows)
    got = model(tokens(1, 11), attending_rows=attending, last=last).logits
    assert_equal(got, expected[:, rows])
    kept = max(set(range(LAYERS)) - dropped)
    assert seen == [11 if index < kept else 2 for index in range(LAYERS)]


@torch.no_grad()
def test_rows_end_where_only_some_of_them_attend_last() -> None:
    """As where the variant that attends longest is in a step with another."""
    model = tiny_model(layers=LAYERS).double()
    for layer in wrap(model):
        layer.substitute = lambda normed: 0.1 * normed
    attending = [11, 4, 4, 0]
    expected = model(tokens(1, 11), attending_rows=attending).logits
    for rows in (torch.tensor([3, 10]), torch.tensor([7]), torch.tensor([2])):
        last = last_rows(attending, None, 11, rows)
        got = model(tokens(1, 11), attending_rows=attending, last=last).logits
        assert_equal(got, expected[:, rows])


def test_nothing_ends_where_all_rows_have_logits_or_mlps_are_dropped() -> None:
    rows = torch.tensor([2])
    assert last_rows([3, 3], None, 3, rows) == (1, rows)
    assert last_rows([3, 3], None, 3, None) is None
    assert last_rows([3, 3], (3, 2), 3, rows) is None
    assert last_rows([3, 3], None, 1, rows) is None
    assert last_rows([0, 0], None, 3, rows) is None


@torch.no_grad()
def test_a_substitute_acts_on_dropped_rows_only() -> None:
    model = tiny_model(layers=LAYERS)
    sublayers = wrap(model)
    hidden = torch.randn(1, 6, 32)
    sublayer = sublayers[1]
    sublayer.substitute = lambda normed: 2 * normed
    unused = {"position_embeddings": (hidden, hidden), "attend": CausalAttention(), "layer": 1}
    assert torch.equal(sublayer(hidden, 0, **unused), hidden + 2 * sublayer.norm(hidden))
    model.model.layers[1].attention.substitute = None
    assert torch.equal(sublayer(hidden, 0, **unused), hidden)


def test_wrapping_twice_is_harmless() -> None:
    model = tiny_model()
    assert wrap(model) == wrap(model)


def test_an_attention_mask_is_refused() -> None:
    model = tiny_model()
    wrap(model)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(1, 4), attention_mask=mask)


def test_an_unknown_family_is_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with pytest.raises(UnknownFamilyError, match=r"'gpt2' is not supported.*llama"):
        wrap(model)
    with pytest.raises(UnknownFamilyError, match="None"):
        family_of(object())


def test_length_dependent_rope_limits_the_context() -> None:
    plain = AutoConfig.for_model("llama", max_position_embeddings=4096)
    assert context_limit(plain) == 4096
    dynamic = AutoConfig.for_model(
        "llama",
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 1024,
        },
    )
    assert context_limit(dynamic) == 1024


def test_the_slice_of_all_layers_is_the_list_and_others_are_lists_of_their_own() -> None:
    model = tiny_model(layers=LAYERS)
    wrap(model)
    layers = model.get_decoder().layers
    assert layers[:LAYERS] is layers[:] is layers[: LAYERS + 1] is layers
    some = layers[1:3]
    assert list(some) == [layers[1], layers[2]]
    assert layers[-1] is layers[LAYERS - 1]
    assert list(layers[::-1]) == list(layers)[::-1]
