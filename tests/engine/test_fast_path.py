"""The fast path, paged kernels and recorded decode steps, against plain transformers and the
reference backend.

On a machine without a GPU the kernels run in Triton's interpreter and a recorded step is called
again instead of replayed: the same code, slowly.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from pruning.families import FAMILIES
from pruning.projections import MergedProjection, merge_projections
from pruning.sublayers import wrap
from pruning.variants import Variant, Variants
from server.engine.attention.tiles import Tiling, choose_tiling
from server.engine.batch import Batch
from server.engine.engine import Engine
from server.engine.graphs import CHUNK_SIZES, Recording, StepGraphs, chunk_sizes_for
from server.engine.layouts import Chunks, SingleRows
from server.engine.request import FinishReason, Request
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
from tests.reference.silenced import greedy, silenced

DROPPED: dict[str, set[int]] = {"full": set(), "light": {2}, "pruned": {1, 2}}
VARIANTS: Variants = tiny_variants(light=DROPPED["light"], pruned=DROPPED["pruned"])
CHUNKED = Limits(tokens_per_step=16, running=4)
ON_GPU = torch.cuda.is_available()
SLOW_TO_INTERPRET = set(FAMILIES) - {"llama", "gemma2"}

new = Numbered()


def finish(engine: Engine, requests: list[Request]) -> None:
    engine.submit(requests)
    for request in requests:
        assert recorder(request).wait(300).reason is FinishReason.LENGTH, recorder(request).events


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 80, (length,), generator=generator).tolist())


def used_recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording | None]:
    """Return a list that will hold what each step is computed by; None: kernel by kernel."""
    used: list[Recording | None] = []
    choose = StepGraphs._recording

    def watched(graphs: StepGraphs, batch: Batch) -> Recording | None:
        used.append(choose(graphs, batch))
        return used[-1]

    monkeypatch.setattr(StepGraphs, "_recording", watched)
    return used


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mixed_chunked_batches_give_the_reference_tokens(family: str) -> None:
    if family in SLOW_TO_INTERPRET and not ON_GPU:
        pytest.skip("takes long in the interpreter; other families run the same kernels")
    engine = fast_engine(VARIANTS, family=family, limits=CHUNKED)
    requests = [
        new.request(prompt_of(seed, length), variant, max_tokens=4)
        for seed, (length, variant) in enumerate(
            [(20, "full"), (3, "pruned"), (11, "light"), (17, "pruned"), (1, "full")]
        )
    ]
    finish(engine, requests)
    engine.stop()
    for request in requests:
        model = silenced(tiny_model(family, layers=LAYERS).double(), DROPPED[request.variant])
        assert recorder(request).tokens == greedy(model, request.prompt, 4)


def test_prompts_in_recorded_steps_give_the_reference_tokens() -> None:
    """Chunks of one prompt and of several, alone and beside rows that decode, of all variants; of a
    family with sliding windows and soft-capping."""
    engine = fast_engine(VARIANTS, family="gemma2", limits=CHUNKED, chunk_sizes=(8, 20))
    recorded = engine._runner._graphs._recorded
    requests = [
        new.request(prompt_of(seed, length), variant, max_tokens=5)
        for seed, (length, variant) in enumerate(
            [(20, "full"), (3, "pruned"), (6, "light"), (17, "pruned"), (1, "full")]
        )
    ]
    finish(engine, requests)
    engine.stop()
    shapes = [each.shape for each in recorded if each.chunks]
    assert any(sum(rows > 0 for rows in shape) > 1 for shape in shapes)
    for request in requests:
        model = silenced(tiny_model("gemma2", layers=LAYERS).double(), DROPPED[request.variant])
        assert recorder(request).tokens == greedy(model, request.prompt, 5)


def test_many_short_prompts_go_into_one_recorded_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than a step of so few rows has room for: the next larger one has."""
    used = used_recordings(monkeypatch)
    limits = Limits(tokens_per_step=64, running=20)
    engine = fast_engine(VARIANTS, limits=limits, pages=100, chunk_sizes=(64, 256))
    prompts = [prompt_of(seed, 2 + seed % 3) for seed in range(20)]
    assert sum(map(len, prompts)) < 64
    assert len(prompts) > choose_tiling(64, 4, 16, 132).most_items(64)
    requests = [new.request(prompt, "pruned", max_tokens=2) for prompt in prompts]
    finish(engine, requests)
    engine.stop()
    assert [each.shape for each in used if each is not None and each.chunks] == [(0, 0, 256)]
    model = silenced(tiny_model(layers=LAYERS).double(), DROPPED["pruned"])
    for request in requests:
        assert recorder(request).tokens == greedy(model, request.prompt, 2)


@torch._dynamo.config.patch(recompile_limit=64)
def test_steps_that_are_not_recorded_compile_nothing_anew() -> None:
    """One row with logits, or none, is no other function than two are: a step that comes first in
    the middle of traffic must not wait for a compiler."""
    torch._dynamo.reset()
    engine = fast_engine(VARIANTS, limits=CHUNKED, chunk_sizes=())
    graphs: list[torch.fx.GraphModule] = []

    def compiler(
        graph: torch.fx.GraphModule, _: list[torch.Tensor]
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        graphs.append(graph)
        return graph.forward

    for layer in engine._runner._model.get_decoder().layers:
        layer.compile(backend=compiler, dynamic=True)
    finish(engine, [new.request(prompt_of(seed, 5), "full", max_tokens=1) for seed in range(2)])
    compiled = len(graphs)
    assert compiled > 0
    for length in (5, 20):
        finish(engine, [new.request(prompt_of(length, length), "full", max_tokens=1)])
    engine.stop()
    assert len(graphs) == compiled


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(1, (64,)), (64, (64,)), (65, (64, 256)), (512, (64, 256, 512)), (2048, None), (8192, None)],
)
def test_steps_are_recorded_up_to_the_first_size_that_holds_all_tokens(
    tokens: int, sizes: tuple[int, ...] | None
) -> None:
    """None: all sizes, of which the last may be too small."""
    assert chunk_sizes_for(tokens) == (sizes or CHUNK_SIZES)


def test_shared_beginnings_in_recorded_steps_give_the_reference_tokens() -> None:
    """More page ids in the block tables than there are pages: requests share their beginning."""
    engine = fast_engine(VARIANTS, pages=12, limits=Limits(running=4))
    beginning = prompt_of(1, 64)
    rounds = [
        [new.request((*beginning, 5 + own), "pruned", max_tokens=6) for own in range(count)]
        for count in (1, 4)
    ]
    for requests in rounds:
        finish(engine, requests)
    found = {v.name: v.prefix_hit_tokens for v in engine.stats().variants}
    preemptions = sum(v.preemptions for v in engine.stats().variants)
    engine.stop()
    assert (found["pruned"], preemptions) == (4 * 64, 0)
    model = silenced(tiny_model("llama", layers=LAYERS).double(), DROPPED["pruned"])
    for request in (request for requests in rounds for request in requests):
        assert recorder(request).tokens == greedy(model, request.prompt, 6)


def test_sampling_from_recorded_steps_equals_the_reference_engine() -> None:
    """Random numbers, bias, bans, penalties and log probabilities, beside plain greedy rows."""
    asked: list[dict[str, object]] = [
        {"temperature": 0.9, "seed": 3, "top_p": 0.9},
        {"logprobs": 3},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 1.0, "seed": 5, "logit_bias": {9: 2.0}, "min_tokens": 3},
    ]
    found = []
    for make in (tiny_engine, fast_engine):
        engine = make(VARIANTS, limits=CHUNKED)
        requests = [
            new.request(prompt_of(i, 5), variant, max_tokens=6, **params)
            for i, (variant, params) in enumerate(zip(["full", "pruned"] * 2, asked, strict=True))
        ]
        finish(engine, requests)
        engine.stop()
        found.append(requests)
    for reference, fast in zip(*found, strict=True):
        assert recorder(fast).tokens == recorder(reference).tokens
        for mine, theirs in zip(recorder(fast).logprobs, recorder(reference).logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


def test_preempted_requests_come_back_to_the_same_tokens() -> None:
    engine = fast_engine(VARIANTS, pages=7, limits=CHUNKED)
    requests = [new.request(prompt_of(i, 10), "full", max_tokens=10) for i in range(2)]
    finish(engine, requests)
    assert sum(variant.preemptions for variant in engine.stats().variants) > 0
    engine.stop()
    model = tiny_model(layers=LAYERS).double()
    for request in requests:
        assert recorder(request).tokens == greedy(model, request.prompt, 10)


def test_variants_that_do_not_nest_take_turns_in_recorded_steps() -> None:
    """`other` drops an MLP too, beside `full`, which does not."""
    every = frozenset(range(LAYERS))
    variants = Variants(
        LAYERS,
        [
            Variant("full", every),
            Variant("pruned", every - DROPPED["pruned"]),
            Variant("other", every - {3}, frozenset({2})),
        ],
    )
    engine = fast_engine(variants, limits=Limits(running=3))
    recorded = engine._runner._graphs._recorded
    places = {variant.name: place for place, variant in enumerate(variants)}
    names = ("full", "other", "pruned", "other")
    requests = [new.request(prompt_of(i, 5), name, max_tokens=4) for i, name in enumerate(names)]
    finish(engine, requests)
    engine.stop()
    shapes = [each.shape for each in recorded]
    assert {"other", "pruned"} <= {
        name for shape in shapes for name in names if shape[places[name]]
    }
    assert not any(shape[places["other"]] and shape[places["pruned"]] for shape in shapes)
    for request in requests:
        dropped = {**DROPPED, "other": {3}}[request.variant]
        mlps = {"other": {2}}.get(request.variant, ())
        model = silenced(tiny_model(layers=LAYERS).double(), dropped, mlps)
        assert recorder(request).tokens == greedy(model, request.prompt, 4)


def test_a_recorded_step_of_a_variant_has_no_rows_in_what_it_drops() -> None:
    layout = SingleRows((0, 0, 4), VARIANTS)  # full, light, pruned
    assert layout.attending_rows == [0 if i in DROPPED["pruned"] else 4 for i in range(LAYERS)]
    mixed = SingleRows((2, 0, 4), VARIANTS)
    chunks = Chunks((2, 0, 4), VARIANTS, most_sequences=4, tiling=Tiling(64, 0))
    assert chunks.attending_rows == mixed.attending_rows
    assert mixed.attending_rows == [2 if i in DROPPED["pruned"] else 6 for i in range(LAYERS)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_merged_projections_change_nothing_and_copy_nothing(family: str) -> None:
    model = tiny_model(family, layers=LAYERS).double()
    wrap(model)
    ids = torch.tensor([prompt_of(0, 9)])
    with torch.no_grad():
        before = model(ids).logits
        size = sum(p.numel() for p in model.parameters())
        merged = merge_projections(model)
        assert merged == (0 if family == "phi3" else 2 * LAYERS)
        assert sum(p.numel() for p in model.parameters()) == size
        for module in model.modules():
            if isinstance(module, MergedProjection):
                whole = module.merged_weight.untyped_storage()
                assert module.weight.untyped_storage().data_ptr() == whole.data_ptr()
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-12)
