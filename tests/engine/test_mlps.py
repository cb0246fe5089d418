"""Variants that drop MLPs, together with others and apart, against plain transformers."""

from __future__ import annotations

import pytest
import torch

from pruning.variants import FULL, Variant, VariantError, Variants
from server.engine.request import FinishReason
from server.engine.scheduler import Limits
from tests.engine.tiny_engine import LAYERS, Numbered, recorder, tiny_engine
from tests.pruning.tiny_models import tiny_model
from tests.reference.silenced import greedy, silenced

EVERY = frozenset(range(LAYERS))
DROPPED: dict[str, tuple[set[int], set[int]]] = {
    "full": (set(), set()),
    "mlp": (set(), {2}),
    "block": ({2}, {2}),
    "joint": ({2}, {2, 3}),
    "pruned": ({1, 3}, set()),
    "other": ({1, 3}, {1}),
}
"""Attention and MLPs. Two chains: full, mlp, block, joint; pruned, other."""
VARIANTS = Variants(
    LAYERS, [Variant(name, EVERY - a, frozenset(m)) for name, (a, m) in DROPPED.items()]
)
TIGHT = Limits(tokens_per_step=7, running=5, waiting=100)

new = Numbered()


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 80, (length,), generator=generator).tolist())


def test_they_nest_where_all_sublayers_do() -> None:
    assert {frozenset(chain) for chain in VARIANTS.chains} == {
        frozenset({"full", "mlp", "block", "joint"}),
        frozenset({"pruned", "other"}),
    }
    assert VARIANTS.chains[0] == ("full", "mlp", "block", "joint")


@pytest.mark.parametrize(("family", "overlaps"), [("llama", True), ("gemma2", False)])
def test_mixed_chunked_batches(family: str, overlaps: bool) -> None:
    engine = tiny_engine(VARIANTS, family=family, limits=TIGHT, overlaps=overlaps, pages=24)
    lengths = [20, 3, 11, 17, 1, 9]
    requests = [
        new.request(prompt_of(length, length), variant, max_tokens=12)
        for variant, length in zip(DROPPED, lengths, strict=True)
    ]
    engine.submit(requests)
    for request in requests:
        assert recorder(request).wait().reason is FinishReason.LENGTH
    engine.stop()
    plain = tiny_model(family, layers=LAYERS).double()
    for request in requests:
        model = silenced(plain, *DROPPED[request.variant])
        assert recorder(request).tokens == greedy(model, request.prompt, 12)
    told = {info.name: info.dropped_mlps for info in engine.describe()}
    assert told == {name: tuple(sorted(mlps)) for name, (_, mlps) in DROPPED.items()}


def test_what_cannot_be_dropped() -> None:
    full = Variant(FULL, EVERY)
    with pytest.raises(VariantError, match="can drop the MLPs of layers 1 to 3"):
        Variants(LAYERS, [full, Variant("a", EVERY, frozenset({0}))])
    with pytest.raises(VariantError, match="keeps every layer"):
        Variants(LAYERS, [Variant(FULL, EVERY, frozenset({1}))])
