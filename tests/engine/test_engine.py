"""The engine's tokens against plain transformers, whatever the traffic; and how requests end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import cache
from math import lcm
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.families import FAMILIES
from pruning.loading import BaseModel
from pruning.variants import Variants
from server.engine.assembly import EngineConfig, EngineConfigError, build_engine
from server.engine.engine import Engine, EngineDeadError, QueueFullError, TooLongError
from server.engine.request import Ended, FinishReason, Request
from server.engine.scheduler import Limits
from tests.engine.tiny_engine import (
    LAYERS,
    Numbered,
    Recorder,
    recorder,
    tiny_engine,
    tiny_variants,
    wrapped,
)
from tests.pruning.tiny_models import tiny_model
from tests.reference.llama import ReferenceLlama
from tests.reference.silenced import greedy, silenced

DROPPED: dict[str, set[int]] = {
    "full": set(),
    "light": {2},
    "pruned": {1, 2},
    "other": {3},
    "crossing": {1, 3},
}
VARIANTS = tiny_variants(light=DROPPED["light"], pruned=DROPPED["pruned"])
CROSSED = tiny_variants(**{name: dropped for name, dropped in DROPPED.items() if dropped})
"""Two chains: full, light, pruned; other, crossing."""
TIGHT = Limits(tokens_per_step=7, scored_tokens_per_step=3, running=5, waiting=100)
"""Prompts are cut into chunks of at most 7 tokens."""

new = Numbered()


@cache
def expected(family: str, variant: str, prompt: tuple[int, ...], count: int) -> list[int]:
    model = silenced(tiny_model(family, layers=LAYERS).double(), DROPPED[variant])
    return greedy(model, prompt, count)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 80, (length,), generator=generator).tolist())


@pytest.fixture(
    scope="module",
    params=[(VARIANTS, 11, False), (VARIANTS, 11, True), (CROSSED, 24, False), (CROSSED, 24, True)],
    ids=["in turn", "overlapping", "two chains in turn", "two chains overlapping"],
)
def tight(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine whose page pool holds one long request, so that others are preempted."""
    variants, pages, overlaps = request.param
    engine = tiny_engine(variants, pages=pages, limits=TIGHT, overlaps=overlaps)
    yield engine
    engine.stop()


def idle(engine: Engine) -> bool:
    return all(v.running == v.waiting == v.kv_bytes == 0 for v in engine.stats().variants)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mixed_chunked_batches_of_every_family(family: str) -> None:
    engine = tiny_engine(CROSSED, family=family, limits=TIGHT)
    requests = [
        new.request(prompt_of(seed, length), variant, max_tokens=12)
        for seed, (length, variant) in enumerate(
            [
                (20, "full"),
                (9, "crossing"),
                (11, "light"),
                (17, "pruned"),
                (1, "full"),
                (3, "other"),
            ]
        )
    ]
    engine.submit(requests)
    for request in requests:
        assert recorder(request).wait().reason is FinishReason.LENGTH
        assert recorder(request).tokens == expected(family, request.variant, request.prompt, 12)
    engine.stop()
    assert idle(engine)


@settings(max_examples=25, deadline=None)
@given(
    traffic=st.lists(
        st.tuples(
            st.integers(0, 14),
            st.sampled_from([1, 5, 16, 23, 40]),
            st.sampled_from([1, 9, 30]),
            st.sampled_from(["stay", "stay", "stay", "abort now", "abort later"]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_traffic_gives_the_reference_tokens_and_one_end(
    tight: Engine, traffic: list[tuple[int, int, int, str]]
) -> None:
    names = [variant.name for variant in tight.variants]
    requests = [
        new.request(prompt_of(length, length), names[which % len(names)], max_tokens=count)
        for which, length, count, _ in traffic
    ]
    for request, (*_, behaviour) in zip(requests, traffic, strict=True):
        tight.submit([request])
        if behaviour == "abort now":
            tight.abort(request.id)
    for request, (*_, behaviour) in zip(requests, traffic, strict=True):
        if behaviour == "abort later":
            tight.abort(request.id)
    for request, (*_, count, behaviour) in zip(requests, traffic, strict=True):
        ended = recorder(request).wait()
        tokens = recorder(request).tokens
        assert tokens == expected("llama", request.variant, request.prompt, 30)[: len(tokens)]
        if behaviour == "stay":
            assert (ended.reason, len(tokens)) == (FinishReason.LENGTH, count)
        assert sum(isinstance(event, Ended) for event in recorder(request).events) == 1
    assert idle(tight)


def test_preemption_happens_and_changes_nothing(tight: Engine) -> None:
    before = sum(variant.preemptions for variant in tight.stats().variants)
    requests = [new.request(prompt_of(i, 10), "full", max_tokens=30) for i in range(3)]
    tight.submit(requests)
    for request in requests:
        recorder(request).wait()
        assert recorder(request).tokens == expected("llama", "full", request.prompt, 30)
    assert sum(variant.preemptions for variant in tight.stats().variants) > before


def test_prompt_scores_survive_chunks_and_preemption(tight: Engine) -> None:
    requests = [
        new.request(prompt_of(i, 40), "pruned", max_tokens=30, prompt_logprobs=0) for i in range(4)
    ]
    tight.submit(requests)
    model = silenced(tiny_model(layers=LAYERS).double(), DROPPED["pruned"])
    for request in requests:
        recorder(request).wait()
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt])).logits[0, :-1]
        scores = torch.log_softmax(logits, -1)[range(39), request.prompt[1:]]
        torch.testing.assert_close(
            torch.tensor(recorder(request).scores).double(), scores, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("pages", [24, 200], ids=["evicting", "roomy"])
def test_shared_beginnings_give_the_reference_tokens(pages: int, overlaps: bool) -> None:
    """Prompts that begin alike, in all variants, one after the other and together."""
    engine = tiny_engine(VARIANTS, pages=pages, limits=TIGHT, overlaps=overlaps)
    beginnings = [prompt_of(seed, 48) for seed in (1, 2)]
    rounds = [
        [
            new.request((*beginning[:cut], *prompt_of(100 + cut, own)), variant, max_tokens=10)
            for beginning in beginnings
            for variant in ("full", "light", "pruned")
        ]
        for cut, own in [(48, 3), (48, 3), (48, 9), (40, 8), (48, 3)]
    ]
    for requests in rounds:
        engine.submit(requests)
        for request in requests:
            assert recorder(request).wait().reason is FinishReason.LENGTH
            tokens = expected("llama", request.variant, request.prompt, 10)
            assert recorder(request).tokens == tokens
    stats = engine.stats().variants
    engine._commands.put(engine._scheduler.check)
    engine.stop()
    assert idle(engine)
    assert all(v.prefix_hit_tokens > 0 for v in stats) or pages == 24
    assert sum(v.prefix_hit_tokens for v in stats) > 0
    assert sum(v.cached_bytes for v in stats) > 0


def test_cached_tokens_are_told_and_counted_by_variant() -> None:
    engine = tiny_engine(VARIANTS, pages=200)
    block = lcm(*(engine._layout.tokens_per_page[g] for g in VARIANTS.groups_of("light")))
    prompt = prompt_of(1, 3 * block + 1)
    asked = [("light", 0), ("light", 3 * block), ("pruned", 0)]
    for variant, cached in asked:
        request = new.request(prompt, variant, max_tokens=2)
        engine.submit([request])
        assert recorder(request).wait().cached_tokens == cached
    by_name = {v.name: v for v in engine.stats().variants}
    assert by_name["light"].prefix_asked_tokens == 2 * len(prompt)
    assert by_name["light"].prefix_hit_tokens == 3 * block
    assert by_name["pruned"].prefix_hit_tokens == by_name["full"].prefix_asked_tokens == 0
    engine.stop()


def test_without_prefix_caching_nothing_is_kept() -> None:
    base = wrapped(tiny_model(layers=LAYERS).double())
    config = EngineConfig(kv_cache_bytes=1 << 20, prefix_caching=False)
    engine = build_engine(base, VARIANTS, config)
    engine.start()
    for _ in range(2):
        request = new.request(prompt_of(1, 60), "pruned", max_tokens=2)
        engine.submit([request])
        assert recorder(request).wait().cached_tokens == 0
    assert all(v.cached_bytes == v.prefix_hit_tokens == 0 for v in engine.stats().variants)
    engine.stop()


def test_no_tokens_asked_for() -> None:
    engine = tiny_engine(VARIANTS)
    request = new.request(prompt_of(0, 9), max_tokens=0, prompt_logprobs=0)
    engine.submit([request])
    assert recorder(request).wait().reason is FinishReason.LENGTH
    assert recorder(request).tokens == []
    assert len(recorder(request).scores) == 8
    engine.stop()


def test_a_stop_token_ends_a_request() -> None:
    engine = tiny_engine(VARIANTS)
    prompt = prompt_of(3, 6)
    third = expected("llama", "full", prompt, 8)[2]
    request = new.request(prompt, max_tokens=8, stop_token_ids=frozenset({third}))
    engine.submit([request])
    assert recorder(request).wait().reason is FinishReason.STOP
    assert recorder(request).tokens == expected("llama", "full", prompt, 3)
    engine.stop()


def test_a_seeded_request_is_the_same_alone_and_in_a_crowd(tight: Engine) -> None:
    def sampled(crowd: int) -> list[int]:
        request = new.request(prompt_of(1, 23), "light", 30, temperature=1.0, seed=7, top_p=0.9)
        others = [
            new.request(prompt_of(i, 16), variant, 30, temperature=1.0, seed=i)
            for i, variant in enumerate(["full", "pruned"] * crowd)
        ]
        tight.submit([*others, request])
        for each in [*others, request]:
            recorder(each).wait()
        return recorder(request).tokens

    assert sampled(0) == sampled(1) == sampled(3)


def test_a_failing_request_ends_alone() -> None:
    """A token the embedding does not have makes the whole batch fail; only its owner may end."""
    engine = tiny_engine(VARIANTS)
    names = [variant.name for variant in VARIANTS]
    good = [new.request(prompt_of(i, 9), variant, 12) for i, variant in enumerate(names)]
    bad = new.request((5, 10_000, 6), max_tokens=4)
    engine.submit([good[0], bad, *good[1:]])
    ended = recorder(bad).wait()
    assert ended.reason is FinishReason.ERROR
    assert "index" in (ended.error or "")
    for request in good:
        assert recorder(request).wait().reason is FinishReason.LENGTH
        assert recorder(request).tokens == expected("llama", request.variant, request.prompt, 12)
    assert engine.stats().alive
    engine.stop()
    assert idle(engine)


def test_the_death_of_the_engine_reaches_every_request() -> None:
    died = threading.Event()
    base = wrapped(tiny_model(layers=LAYERS).double())
    engine = build_engine(base, VARIANTS, EngineConfig(kv_cache_bytes=1 << 20), died.set)
    requests = [new.request(prompt_of(i, 9), max_tokens=100) for i in range(3)]

    def break_the_page_accounts() -> None:
        engine._scheduler._pool.take(1)
        engine._scheduler.check()

    engine._commands.put(break_the_page_accounts)
    engine.submit(requests)
    engine.start()
    for request in requests:
        ended = recorder(request).wait()
        assert ended.reason is FinishReason.ERROR
        assert "1 are lost" in (ended.error or "")
    assert died.wait(10)
    assert not engine.stats().alive
    with pytest.raises(EngineDeadError):
        engine.submit([new.request((5,))])


def test_while_a_step_is_committed_the_next_one_is_on_its_way() -> None:
    """Where the device runs on its own it must never wait for the host."""
    engine = tiny_engine(VARIANTS, overlaps=True)
    with (
        patch.object(engine, "_launch", wraps=engine._launch) as launch,
        patch.object(engine, "_commit", wraps=engine._commit) as commit,
    ):
        calls = Mock()
        calls.attach_mock(launch, "launch")
        calls.attach_mock(commit, "commit")
        requests = [new.request(prompt_of(i, 9), max_tokens=8) for i in range(3)]
        engine.submit(requests)
        for request in requests:
            recorder(request).wait()
        engine.stop()
    order = [name for name, *_ in calls.mock_calls]
    assert order == ["launch", *["launch", "commit"] * 7, "commit"]


def test_stopping_aborts_what_runs_and_what_waits() -> None:
    engine = tiny_engine(VARIANTS, limits=Limits(running=1))
    requests = [new.request(prompt_of(i, 9), max_tokens=100) for i in range(5)]
    engine.submit(requests)
    engine.stop()
    ends = {recorder(request).wait().reason for request in requests}
    assert ends <= {FinishReason.ABORT, FinishReason.LENGTH}
    assert FinishReason.ABORT in ends


def test_the_queue_is_bounded_and_takes_all_or_nothing() -> None:
    config = EngineConfig(Limits(waiting=3), kv_cache_bytes=1 << 20)
    engine = build_engine(wrapped(tiny_model(layers=LAYERS)), VARIANTS, config)
    engine.submit([new.request((5,)), new.request((6,))])
    with pytest.raises(QueueFullError, match="2 requests are waiting and 3 may"):
        engine.submit([new.request((5,)), new.request((6,))])
    engine.submit([new.request((7,))])
    engine.start()
    engine.stop()


def test_what_can_never_fit_is_refused() -> None:
    engine = tiny_engine(VARIANTS, pages=9)
    with pytest.raises(TooLongError, match=r"120 prompt tokens and 20 .* make 140, and at most"):
        engine.submit([new.request(prompt_of(0, 120), max_tokens=20)])
    assert engine.limit("pruned") >= engine.limit("full")
    engine.stop()
    base = wrapped(tiny_model(layers=LAYERS))
    with pytest.raises(EngineConfigError, match="too few for a single sequence"):
        build_engine(base, VARIANTS, EngineConfig(kv_cache_bytes=100))
    with pytest.raises(EngineConfigError, match="longer than the 128 tokens"):
        build_engine(base, VARIANTS, EngineConfig(context=1000))


def test_kv_bytes_are_a_count_of_pages() -> None:
    """With half of the layers dropped, a pool holds exactly twice as many pruned tokens."""
    variants = tiny_variants(pruned={1, 2})
    engine = tiny_engine(variants, pages=20)
    full, pruned = engine.describe()
    assert (full.name, pruned.name) == ("full", "pruned")
    assert pruned.capacity_tokens == 2 * full.capacity_tokens
    assert full.kv_bytes_per_token == 2 * pruned.kv_bytes_per_token
    assert full.capacity_tokens * full.kv_bytes_per_token == engine.stats().pool_bytes
    engine.stop()


@pytest.fixture(scope="module")
def dropped_of_base() -> list[int]:
    return [5, 6, 7, 11, 18, 25, 26, 28]


@pytest.fixture(scope="module")
def checkpoint(base: BaseModel) -> Path:
    return base.checkpoint


def test_the_real_model_equals_a_llama_written_by_hand(
    base: BaseModel, checkpoint: Path, dropped_of_base: list[int]
) -> None:
    variants: Variants = tiny_variants(base.layers, pruned=set(dropped_of_base))
    config = EngineConfig(Limits(tokens_per_step=8), kv_cache_bytes=1 << 27)
    engine = build_engine(base, variants, config)
    engine.start()
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a land far"]
    requests = [
        new.request(base.tokenizer(text)["input_ids"], variant, max_tokens=16)
        for text in texts
        for variant in ("full", "pruned")
    ]
    start = time.monotonic()
    engine.submit(requests)
    for request in requests:
        recorder(request).wait(120)
    print(f"served in {time.monotonic() - start:.1f} s")
    references = {
        "full": ReferenceLlama(checkpoint),
        "pruned": ReferenceLlama(checkpoint, dropped_of_base),
    }
    for request in requests:
        assert recorder(request).tokens == references[request.variant].greedy(request.prompt, 16)
    engine.stop()


def test_a_recorder_takes_no_event_after_the_end() -> None:
    """The harness itself: `exactly one end` is asserted by every sink above."""
    request: Request = new.request((5,))
    sink = Recorder()
    ended = Ended(FinishReason.STOP, request.timeline(0.0))
    sink.put(ended)
    with pytest.raises(AssertionError, match="after the end"):
        sink.put(ended)
