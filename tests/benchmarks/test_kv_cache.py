"""The benchmark of KV caches on a tiny model: its figures are those of plain transformers that
rounds, and fit together. No figure is held against a time."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.kv_cache import DTYPES, Row, Work, compared, measure
from benchmarks.shapes import PRUNED, half_dropped
from pruning.variants import FULL
from tests.engine.tiny_engine import LAYERS, wrapped
from tests.pruning.tiny_models import tiny_model
from tests.reference.rounded import with_rounded_keys
from tests.reference.silenced import silenced

WINDOWS = torch.randint(4, 80, (3, 40), generator=torch.Generator().manual_seed(0))
WORK = Work(WINDOWS, chunk=7, batches=(1, 2), context=64, repeats=1, pool_bytes=1 << 20)
STORED = {"auto": "float64", "fp8": "float8_e4m3fn"}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    found = {
        each: measure(wrapped(tiny_model(layers=LAYERS).double()), half_dropped(LAYERS), each, WORK)
        for each in DTYPES
    }
    return {(r.variant, r.kv_cache_dtype): r for r in compared(found, WINDOWS, STORED)}  # type: ignore[arg-type]


def reference(variant: str, *, rounds: bool) -> torch.Tensor:
    """Return [windows, length - 1, vocabulary] log probabilities by plain transformers."""
    dropped = half_dropped(LAYERS)[variant].dropped(LAYERS)
    model = silenced(tiny_model(layers=LAYERS).double(), dropped)
    model = with_rounded_keys(model) if rounds else model
    with torch.no_grad():
        return model(WINDOWS, use_cache=False).logits[:, :-1].log_softmax(-1)


@pytest.mark.parametrize("variant", [FULL, PRUNED])
def test_quality_is_that_of_plain_transformers_that_rounds(
    rows: dict[tuple[str, str], Row], variant: str
) -> None:
    true, mine = (reference(variant, rounds=rounds) for rounds in (False, True))
    exact, eight = rows[variant, "float64"], rows[variant, "float8_e4m3fn"]
    for row, logprobs in ((exact, true), (eight, mine)):
        loss = -logprobs.gather(2, WINDOWS[:, 1:, None]).mean()
        assert row.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert (exact.perplexity_ratio, exact.kl, exact.agreement) == (1, 0, 1)
    assert eight.perplexity_ratio == pytest.approx(eight.perplexity / exact.perplexity)
    assert eight.kl == pytest.approx((true.exp() * (true - mine)).sum(-1).mean().item(), rel=1e-3)
    assert eight.kl > 1e-4
    agreement = (true.argmax(-1) == mine.argmax(-1)).double().mean().item()
    assert eight.agreement == pytest.approx(agreement)


def test_bytes_and_times_fit_together(rows: dict[tuple[str, str], Row]) -> None:
    assert len(rows) == 4
    for variant in (FULL, PRUNED):
        exact, eight = rows[variant, "float64"], rows[variant, "float8_e4m3fn"]
        assert exact.kv_bytes_per_token == 8 * eight.kv_bytes_per_token
        assert eight.capacity_tokens == 8 * exact.capacity_tokens
        assert set(eight.step_seconds) == set(eight.over_auto) == {1, 2}
        for batch, over in eight.over_auto.items():
            assert over == exact.step_seconds[batch] / eight.step_seconds[batch]
