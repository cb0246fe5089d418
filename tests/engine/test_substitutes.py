"""Substitutes in the engine: requests of every variant, together, against plain transformers in
which other modules stand in the dropped layers' places."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from pruning.substitutes import LinearSubstitute, Substitutes
from server.engine.request import FinishReason
from server.engine.scheduler import Limits
from tests.engine.tiny_engine import (
    LAYERS,
    Numbered,
    fast_engine,
    recorder,
    tiny_engine,
    tiny_variants,
)
from tests.pruning.tiny_models import tiny_model
from tests.reference.divergence import substituted
from tests.reference.silenced import greedy

WIDTH = 32
DROPPED: dict[str, set[int]] = {"full": set(), "light": {2}, "pruned": {1, 2}}
VARIANTS = tiny_variants(light=DROPPED["light"], pruned=DROPPED["pruned"])
ASKED = [(20, "full"), (3, "pruned"), (11, "light"), (17, "pruned"), (1, "full")]


def random_maps() -> dict[int, LinearSubstitute]:
    """One of full rank, for both variants, and one of rank 4."""
    torch.manual_seed(11)
    return {
        2: LinearSubstitute(torch.randn(WIDTH, WIDTH) / 6, torch.randn(WIDTH)),
        1: LinearSubstitute(torch.randn(WIDTH, 4) / 3, torch.randn(WIDTH), torch.randn(4, WIDTH)),
    }


def reference(family: str, variant: str, prompt: tuple[int, ...]) -> list[int]:
    maps = {}
    for layer in DROPPED[variant]:
        each = random_maps()[layer]
        weight = each.weight if each.down is None else each.weight @ each.down
        maps[layer] = (weight.double(), each.bias.double())
    return greedy(substituted(tiny_model(family, layers=LAYERS).double(), maps), prompt, 6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite"])
@pytest.mark.parametrize("make", [tiny_engine, fast_engine], ids=["reference", "fast"])
def test_mixed_batches_give_the_reference_tokens(make, family: str) -> None:
    if make is fast_engine:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("needs Triton")
        if family != "llama" and not torch.cuda.is_available():
            pytest.skip("takes long in the interpreter; other families run the same kernels")
    engine = make(
        VARIANTS,
        family=family,
        limits=Limits(tokens_per_step=16, running=4),
        substitutes=Substitutes(random_maps()),
    )
    asked = ASKED if make is tiny_engine or torch.cuda.is_available() else ASKED[1:3]
    new = Numbered()
    prompts = [
        tuple(torch.randint(4, 80, (n,), generator=torch.Generator().manual_seed(n)).tolist())
        for n, _ in asked
    ]
    requests = [
        new.request(prompt, variant, max_tokens=6)
        for prompt, (_, variant) in zip(prompts, asked, strict=True)
    ]
    engine.submit(requests)
    for request in requests:
        assert recorder(request).wait(300).reason is FinishReason.LENGTH
    engine.stop()
    found = [recorder(request).tokens for request in requests]
    expected = [
        reference(family, variant, prompt)
        for prompt, (_, variant) in zip(prompts, asked, strict=True)
    ]
    assert found == expected
