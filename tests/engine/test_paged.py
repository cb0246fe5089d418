"""The paged backend against the reference backend: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pruning.attention import AttentionForm
from pruning.variants import Variants
from server.engine.assembly import EngineConfigError, choose_attention
from server.engine.attention.paged import PagedBackend
from server.engine.attention.sdpa import SdpaBackend
from server.engine.batch import Batch, build_batch
from server.engine.pages import PagePool, page_layout
from server.engine.scheduler import Limits, Scheduler
from tests.engine.tiny_engine import Numbered, tiny_variants

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
new = Numbered()

FORMS = {
    "plain": (8, 2, 128, AttentionForm(128**-0.5)),
    "no groups": (3, 3, 64, AttentionForm(0.2)),
    "odd heads, window": (9, 3, 64, AttentionForm(0.125, sliding_window=100)),
    "wide heads, capped": (4, 2, 256, AttentionForm(0.0625, sliding_window=60, softcap=50.0)),
    "head width of no power of two": (4, 2, 96, AttentionForm(0.1)),
}


def mixed_batch(variants: Variants, layout: object, pages: int) -> Batch:
    """Return a step in which both variants decode at several lengths and prefill in chunks."""
    scheduler = Scheduler(Limits(tokens_per_step=400), variants, layout, PagePool(pages))  # type: ignore[arg-type]
    for length in (1, 17, 130, 333):
        for variant in ("full", "pruned"):
            scheduler.add(new.request([5] * length, variant))
    for scheduled in scheduler.schedule():
        scheduled.request.num_computed_tokens = scheduled.count
        if scheduled.request.remaining == 0:
            scheduled.request.output.append(7)
    return build_batch(scheduler.schedule(), variants, layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_paged_equals_sdpa(form: tuple[int, int, int, AttentionForm]) -> None:
    heads, kv_heads, dim, shape = form
    variants = tiny_variants(8, pruned={2, 3, 5})
    layout = page_layout([len(g.layers) for g in variants.groups], 2 * kv_heads * dim)
    pool = torch.randn(200, layout.page_elements, dtype=DTYPE, device=DEVICE)
    paged = PagedBackend(pool.clone(), layout, variants, kv_heads)
    reference = SdpaBackend(pool.double(), layout, variants, kv_heads)
    batch = mixed_batch(variants, layout, 200)
    assert len({int(count) for count in batch.lengths}) > 4
    for backend in (paged, reference):
        backend.prepare(batch)
    for layer in (0, 2, 7):
        rows = batch.attending_rows[layer]
        q, k, v = (
            torch.randn(1, count, rows, dim, dtype=DTYPE, device=DEVICE)
            for count in (heads, kv_heads, kv_heads)
        )
        got = paged(layer, q, k, v, shape).double()
        expected = reference(layer, q.double(), k.double(), v.double(), shape)
        assert torch.isfinite(got).all()
        assert (got - expected).norm() / expected.norm() < 5e-3


def test_a_cpu_gets_the_reference() -> None:
    pool = torch.zeros(4, 32)
    assert choose_attention("auto", pool) == "sdpa"
    assert choose_attention("paged", pool) == "paged"


def test_paged_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineConfigError, match="needs the package triton"):
        choose_attention("paged", torch.zeros(4, 32))
