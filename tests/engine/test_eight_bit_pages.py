"""Pages in eight bits: what they hold, and engines on them against plain transformers that rounds
every key and value."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from typer.testing import CliRunner

from pruning.attention import AttentionForm
from pruning.variants import Variants
from server.cli import app
from server.config import Settings
from server.engine.assembly import EngineConfig, build_engine
from server.engine.attention.eight_bits import E4M3, LARGEST, packed, unpacked
from server.engine.attention.sdpa import SdpaBackend
from server.engine.batch import build_batch
from server.engine.engine import Engine
from server.engine.pages import PagePool, page_layout
from server.engine.request import FinishReason, Request
from server.engine.scheduler import Limits, Scheduler
from server.metrics import Metrics
from tests.engine.tiny_engine import (
    LAYERS,
    Numbered,
    fast_engine,
    recorder,
    tiny_engine,
    tiny_variants,
    wrapped,
)
from tests.pruning.tiny_models import tiny_model
from tests.reference.rounded import rounded, with_rounded_keys
from tests.reference.silenced import greedy, silenced

FAMILIES = ("llama", "mistral", "gemma2")
"""Plain; all layers with a sliding window; every other one with it, and soft-capping."""
DROPPED: dict[str, set[int]] = {"full": set(), "light": {2}, "pruned": {1, 2}}
VARIANTS = tiny_variants(light=DROPPED["light"], pruned=DROPPED["pruned"])
TIGHT = Limits(tokens_per_step=7, scored_tokens_per_step=3, running=5)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

new = Numbered()


@cache
def expected(family: str, variant: str, prompt: tuple[int, ...], count: int) -> list[int]:
    model = silenced(tiny_model(family, layers=LAYERS).double(), DROPPED[variant])
    return greedy(with_rounded_keys(model), prompt, count)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 80, (length,), generator=generator).tolist())


def served(engine: Engine, requests: list[Request]) -> list[list[int]]:
    engine.submit(requests)
    for request in requests:
        assert recorder(request).wait(300).reason is FinishReason.LENGTH, recorder(request).events
    return [recorder(request).tokens for request in requests]


def wanted(family: str, requests: list[Request]) -> list[list[int]]:
    return [expected(family, r.variant, r.prompt, r.params.max_tokens) for r in requests]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_number_of_eight_bits_is_read_as_torch_reads_it(
    dtype: torch.dtype, device: str
) -> None:
    every = torch.arange(256, device=device).to(torch.uint8)
    numbers = every[~every.view(E4M3).isnan()]
    assert len(numbers) == 254
    read = unpacked(numbers, dtype)
    assert read.dtype == dtype
    assert torch.equal(read, numbers.view(E4M3).to(dtype))
    assert torch.equal(packed(read), numbers)


def test_numbers_are_rounded_to_the_nearest_and_saturate() -> None:
    given = [1.0625, 1.1875, 1.95, 2**-9, 1.1 * 2**-10, 2**-10, 449.0, 1e30, math.inf, -500.0]
    stored = [1.0, 1.25, 2.0, 2**-9, 2**-9, 0.0, LARGEST, LARGEST, LARGEST, -LARGEST]
    assert unpacked(packed(torch.tensor(given)), torch.float32).tolist() == stored


@pytest.mark.parametrize("device", DEVICES)
def test_sdpa_attends_over_what_was_rounded(device: str) -> None:
    """Prompts in chunks, then single rows, against the same backend on rounded float64."""
    variants = tiny_variants(LAYERS, pruned={1, 2})
    layout = page_layout([len(g.layers) for g in variants.groups], 2 * 2 * 16)
    pool = torch.zeros(60, layout.page_elements, dtype=E4M3, device=device)
    backend = SdpaBackend(pool, layout, variants, kv_heads=2)
    exact = SdpaBackend(pool.double(), layout, variants, kv_heads=2)
    scheduler = Scheduler(Limits(tokens_per_step=40), variants, layout, PagePool(60))
    for length in (1, 17, 70):
        for variant in ("full", "pruned"):
            scheduler.add(new.request([5] * length, variant))
    form = AttentionForm(0.25, sliding_window=30, softcap=20.0)
    for _ in range(8):
        batch = build_batch(scheduler.schedule(), variants, layout)
        backend.prepare(batch)
        exact.prepare(batch)
        for layer in range(LAYERS):
            rows = batch.attending_rows[layer]
            q, k, v = (
                torch.randn(1, heads, rows, 16, dtype=torch.float64, device=device)
                for heads in (4, 2, 2)
            )
            v[:, :, ::3] = 1e4
            got = backend(layer, q, k, v, form)
            torch.testing.assert_close(got, exact(layer, q, rounded(k), rounded(v), form))
        scheduler.advance(batch.sequences)
        for index in batch.sampled:
            batch.sequences[index].request.output.append(7)


@pytest.mark.parametrize("overlaps", [False, True], ids=["in turn", "overlapping"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_chunked_batches_give_the_tokens_of_rounded_keys(family: str, overlaps: bool) -> None:
    engine = tiny_engine(
        VARIANTS, family=family, limits=TIGHT, overlaps=overlaps, kv_cache_dtype="fp8"
    )
    asked = [(20, "full"), (11, "light"), (17, "pruned"), (1, "full"), (43, "pruned")]
    requests = [
        new.request(prompt_of(seed, length), variant, max_tokens=12)
        for seed, (length, variant) in enumerate(asked)
    ]
    assert served(engine, requests) == wanted(family, requests)
    engine.stop()


def test_the_reference_rounds() -> None:
    """Else the tests beside this one would hold nothing."""
    exact = greedy(tiny_model(layers=LAYERS).double(), prompt_of(0, 20), 30)
    assert expected("llama", "full", prompt_of(0, 20), 30) != exact


def test_preempted_requests_come_back_to_the_same_tokens() -> None:
    engine = tiny_engine(VARIANTS, pages=11, limits=TIGHT, kv_cache_dtype="fp8")
    requests = [new.request(prompt_of(i, 10), "full", max_tokens=30) for i in range(3)]
    assert served(engine, requests) == wanted("llama", requests)
    assert sum(variant.preemptions for variant in engine.stats().variants) > 0
    engine.stop()


def test_shared_beginnings_give_the_same_tokens() -> None:
    engine = tiny_engine(VARIANTS, pages=200, kv_cache_dtype="fp8_e4m3")
    beginning = prompt_of(1, 64)
    for own in range(3):
        request = new.request((*beginning, 5 + own), "pruned", max_tokens=12)
        assert served(engine, [request]) == wanted("llama", [request])
        assert (recorder(request).wait().cached_tokens > 0) == (own > 0)
    engine.stop()


@pytest.mark.parametrize("chunk", [3, 64])
def test_scores_do_not_depend_on_the_chunks(chunk: int) -> None:
    limits = Limits(tokens_per_step=chunk, scored_tokens_per_step=chunk)
    engine = tiny_engine(VARIANTS, limits=limits, kv_cache_dtype="fp8")
    request = new.request(prompt_of(2, 40), "light", max_tokens=1, prompt_logprobs=0)
    served(engine, [request])
    engine.stop()
    model = with_rounded_keys(silenced(tiny_model(layers=LAYERS).double(), DROPPED["light"]))
    with torch.no_grad():
        logits = model(torch.tensor([request.prompt])).logits[0, :-1]
    scores = torch.log_softmax(logits, -1)[range(39), request.prompt[1:]]
    torch.testing.assert_close(
        torch.tensor(recorder(request).scores).double(), scores, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"] if torch.cuda.is_available() else ["gemma2"])
def test_the_fast_path_gives_the_tokens_of_rounded_keys(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, recorded steps and a preempted request."""
    pytest.importorskip("triton")
    from tests.engine.interpreter import round_to_nearest_even

    round_to_nearest_even(monkeypatch)
    limits = Limits(tokens_per_step=16, running=4)
    engine = fast_engine(VARIANTS, family=family, pages=7, limits=limits, kv_cache_dtype="fp8")
    requests = [
        new.request(prompt_of(i, length), variant, max_tokens=count)
        for i, (length, variant, count) in enumerate(
            [(10, "pruned", 4), (10, "full", 12), (10, "full", 12)]
        )
    ]
    assert served(engine, requests) == wanted(family, requests)
    assert sum(variant.preemptions for variant in engine.stats().variants) > 0
    engine.stop()


@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_same_bytes_hold_more_tokens(dtype: torch.dtype, times: int) -> None:
    def engine(kv_cache_dtype: str) -> Engine:
        base = wrapped(tiny_model(layers=LAYERS).to(dtype))  # type: ignore[arg-type]
        config = EngineConfig(kv_cache_bytes=1 << 20, kv_cache_dtype=kv_cache_dtype)  # type: ignore[arg-type]
        return build_engine(base, halved, config)

    halved: Variants = tiny_variants(pruned={1, 2})
    model, eight = engine("auto"), engine("fp8")
    assert eight._scheduler.pages == times * model._scheduler.pages
    assert eight.stats().pool_bytes == model.stats().pool_bytes == 1 << 20
    for wide, narrow in zip(model.describe(), eight.describe(), strict=True):
        assert narrow.capacity_tokens == times * wide.capacity_tokens
        assert wide.kv_bytes_per_token == times * narrow.kv_bytes_per_token
    full, pruned = eight.describe()
    assert full.kv_bytes_per_token == 2 * pruned.kv_bytes_per_token == LAYERS * 2 * 2 * 8
    metrics = Metrics("tiny", eight.describe(), {}, {"plan_id": "p"}, "0", eight.stats)
    line = f'kv_bytes_per_token{{model_name="tiny",variant="full"}} {LAYERS * 2 * 2 * 8}.0'
    assert line in metrics.render()[0].decode()


@pytest.mark.parametrize("spelling", ["auto", "fp8", "fp8_e4m3"])
def test_a_setting_reaches_the_engine(spelling: str) -> None:
    settings = Settings(kv_cache_dtype=spelling)  # type: ignore[arg-type]
    assert settings.engine(torch.device("cpu")).kv_cache_dtype == spelling


def test_other_dtypes_are_refused_by_name() -> None:
    refused = CliRunner().invoke(app, ["serve", "--kv-cache-dtype", "fp8_e5m2"])
    assert refused.exit_code == 1
    assert "--kv-cache-dtype" in refused.output
    assert "'auto', 'fp8' or 'fp8_e4m3'" in refused.output
