"""The paged backend against the reference backend: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from pruning.attention import AttentionForm
from pruning.variants import Variants
from server.engine.assembly import EngineConfigError, choose_attention
from server.engine.attention.eight_bits import E4M3, packed
from server.engine.attention.kernels import Angles
from server.engine.attention.paged import PagedBackend
from server.engine.attention.sdpa import SdpaBackend
from server.engine.batch import Batch, build_batch
from server.engine.layouts import Chunks
from server.engine.pages import PageLayout, PagePool, page_layout
from server.engine.scheduler import Limits, Scheduler
from tests.engine.interpreter import round_to_nearest_even
from tests.engine.tiny_engine import Numbered, tiny_variants
from tests.reference.rotary import rotated
from tests.reference.rounded import rounded

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
LAYERS = (3, 7)
"""One of each layer group, neither the first of its own."""
new = Numbered()

FORMS = {
    "plain": (4, 2, 128, AttentionForm(128**-0.5)),
    "no groups": (2, 2, 64, AttentionForm(0.2)),
    "odd heads, window": (6, 2, 64, AttentionForm(0.125, sliding_window=100)),
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


def decode_batch(variants: Variants, layout: object, pages: int) -> Batch:
    """Return a step of single rows, whose keys and values the decode kernel writes itself."""
    scheduler = Scheduler(Limits(tokens_per_step=600), variants, layout, PagePool(pages))  # type: ignore[arg-type]
    for length in (1, 17, 130):
        for variant in ("full", "pruned"):
            scheduler.add(new.request([5] * length, variant))
    scheduler.advance(scheduler.schedule())
    for request in scheduler.running:
        request.output.append(7)
    batch = build_batch(scheduler.schedule(), variants, layout)  # type: ignore[arg-type]
    assert len(batch.token_ids) == len(batch.sequences) == 6
    return batch


def queries_keys_values(heads: int, kv_heads: int, rows: int, dim: int) -> Iterator[torch.Tensor]:
    for count in (heads, kv_heads, kv_heads):
        yield torch.randn(1, count, rows, dim, dtype=DTYPE, device=DEVICE)


class Both(NamedTuple):
    """Two backends of some variants, each on pages of its own that begin with the same numbers."""

    variants: Variants
    layout: PageLayout
    pool: torch.Tensor
    exact: torch.Tensor
    """In float64, the reference's."""
    paged: PagedBackend
    reference: SdpaBackend


def both_backends(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = DTYPE) -> Both:
    variants = tiny_variants(8, pruned={2, 3, 5})
    layout = page_layout([len(g.layers) for g in variants.groups], 2 * kv_heads * dim)
    pool = torch.randn(200, layout.page_elements, device=DEVICE).to(dtype)
    exact = pool.double()
    paged = PagedBackend(pool, layout, variants, heads, kv_heads)
    reference = SdpaBackend(exact, layout, variants, kv_heads)
    return Both(variants, layout, pool, exact, paged, reference)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_paged_equals_sdpa(form: tuple[int, int, int, AttentionForm]) -> None:
    heads, kv_heads, dim, shape = form
    variants, layout, _, _, paged, reference = both_backends(heads, kv_heads, dim)
    batch = mixed_batch(variants, layout, 200)
    assert len({int(count) for count in batch.lengths}) > 4
    for backend in (paged, reference):
        backend.prepare(batch)
    for layer in LAYERS:
        rows = batch.attending_rows[layer]
        q, k, v = queries_keys_values(heads, kv_heads, rows, dim)
        got = paged(layer, q, k, v, shape).double()
        expected = reference(layer, q.double(), k.double(), v.double(), shape)
        assert torch.isfinite(got).all()
        assert (got - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize("dtype", [DTYPE, E4M3], ids=["own dtype", "eight bits"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_paged_rotates_queries_and_keys(
    form: tuple[int, int, int, AttentionForm],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)  # a sum next to where eight bits round up may fall on either side
    round_to_nearest_even(monkeypatch)
    heads, kv_heads, dim, shape = form
    variants, layout, pool, exact, paged, reference = both_backends(heads, kv_heads, dim, dtype)
    for batch in (mixed_batch(variants, layout, 200), decode_batch(variants, layout, 200)):
        for backend in (paged, reference):
            backend.prepare(batch)
        rows = batch.attending_rows[LAYERS[0]]
        q, k, v = queries_keys_values(heads, kv_heads, rows, dim)
        wide = torch.randn(1, rows, 2 * dim, dtype=DTYPE, device=DEVICE)
        cos, sin = wide[0, :, :dim].cos(), wide[0, :, dim:].sin()
        cos[:, dim // 2 :], sin[:, dim // 2 :] = cos[:, : dim // 2], sin[:, : dim // 2]
        got = paged(LAYERS[0], q, k, v, shape, Angles(cos, sin)).double()
        q, k = (rotated(x.double(), cos.double(), sin.double()).to(x.dtype) for x in (q, k))
        if dtype == E4M3:
            k, v = rounded(k), rounded(v)
        expected = reference(LAYERS[0], q.double(), k.double(), v.double(), shape)
        assert (got - expected).norm() / expected.norm() < 5e-3
    if dtype == DTYPE:
        assert (pool.double() - exact).norm() / exact.norm() < 5e-3
    else:
        assert torch.equal(pool.view(torch.uint8), packed(exact))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_pages_in_eight_bits_equal_sdpa_on_what_was_rounded(
    form: tuple[int, int, int, AttentionForm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both for what is read and for what is left in the pages; some values are beyond E4M3."""
    round_to_nearest_even(monkeypatch)
    heads, kv_heads, dim, shape = form
    variants, layout, pool, exact, paged, reference = both_backends(heads, kv_heads, dim, E4M3)
    for batch in (mixed_batch(variants, layout, 200), decode_batch(variants, layout, 200)):
        for backend in (paged, reference):
            backend.prepare(batch)
        for layer in LAYERS:
            rows = batch.attending_rows[layer]
            q, k, v = queries_keys_values(heads, kv_heads, rows, dim)
            v *= 300
            assert v.abs().max() > 448
            got = paged(layer, q, k, v, shape).double()
            k, v = rounded(k).double(), rounded(v).double()
            expected = reference(layer, q.double(), k, v, shape)
            assert torch.isfinite(got).all()
            assert (got - expected).norm() / expected.norm() < 5e-3
        assert torch.equal(pool.view(torch.uint8), packed(exact))


@pytest.mark.parametrize("form", ["plain", "odd heads, window"])
def test_one_recorded_shape_serves_chunks_after_any_context(form: str) -> None:
    """A prompt's first chunk, whose tiles are whole, and later ones, whose tiles are cut."""
    heads, kv_heads, dim, shape = FORMS[form]
    variants, layout, _, _, paged, reference = both_backends(heads, kv_heads, dim)
    scheduler = Scheduler(Limits(tokens_per_step=100), variants, layout, PagePool(200))
    for length, variant in ((3, "full"), (900, "full"), (30, "pruned")):
        scheduler.add(new.request([5] * length, variant))
    recorded = Chunks((104, 40), variants, 16, paged.tiling(144))
    size = recorded.size + 1000
    cut = []
    for step in range(9):
        batch = build_batch(scheduler.schedule(), variants, layout)
        filled = torch.from_numpy(recorded.fill(batch, batch.sources))
        inputs = torch.zeros(size, dtype=torch.int32, device=DEVICE)
        inputs[: len(filled)] = filled
        bound = recorded.bind(inputs, longest=1000)
        cut.append(max(int(g.chunks.items[:, 3].max()) for g in bound if g and g.chunks) > 1)
        paged.bind(bound)
        reference.prepare(batch)
        places = torch.from_numpy(recorded.rows(batch)).to(DEVICE)
        for layer in LAYERS if step in (0, 1, 8) else ():
            padded, real = recorded.attending_rows[layer], batch.attending_rows[layer]
            qkv = list(queries_keys_values(heads, kv_heads, padded, dim))
            own = [x[:, :, places[:real]].double() for x in qkv]
            got = paged(layer, *qkv, shape)[:, places[:real]].double()
            expected = reference(layer, *own, shape)
            assert torch.isfinite(got).all()
            assert (got - expected).norm() / expected.norm() < 5e-3
        scheduler.advance(batch.sequences)
        for index in batch.sampled:
            batch.sequences[index].request.output.append(7)
    assert not cut[0]
    assert cut[8]


def test_a_cpu_gets_the_reference() -> None:
    pool = torch.zeros(4, 32)
    assert choose_attention("auto", pool, pool.dtype) == "sdpa"
    assert choose_attention("paged", pool, pool.dtype) == "paged"


def test_gpus_without_eight_bits_get_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    pool = SimpleNamespace(device=torch.device("cuda"), dtype=E4M3)
    assert choose_attention("auto", pool, torch.bfloat16) == "sdpa"  # type: ignore[arg-type]
    with pytest.raises(EngineConfigError, match=r"8.9 or more .*--attention-backend sdpa"):
        choose_attention("paged", pool, torch.bfloat16)  # type: ignore[arg-type]
    pool.dtype = torch.bfloat16
    assert choose_attention("auto", pool, torch.bfloat16) == "paged"  # type: ignore[arg-type]


def test_paged_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineConfigError, match="needs the package triton"):
        choose_attention("paged", torch.zeros(4, 32), torch.float32)
