"""Native functions against the reference backend and torch's product in float64."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pruning.attention import AttentionForm
from pruning.quantised import (
    GROUP,
    EightBitHead,
    FourBitLinear,
    four_bits,
    quantise,
    quantise_substitutes,
    runs_here,
)
from server.engine.ahead import RowRange, _compile, _load
from server.engine.assembly import EngineConfig, build_engine
from server.engine.attention.rows import RowsBackend
from server.engine.attention.sdpa import SdpaBackend
from server.engine.batch import Batch, Batches, build_batch
from server.engine.native import EXACT_ROWS, NativeFunctions, four_bit_rows, native_functions
from server.engine.pages import PageLayout, PagePool, page_layout
from server.engine.request import FinishReason
from server.engine.scheduler import Limits, Scheduled, Scheduler
from tests.engine.test_native_substitutes import random_substitute
from tests.engine.tiny_engine import Numbered, recorder, tiny_variants, wrapped
from tests.pruning.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(
    not runs_here(torch.device("cpu")), reason="the functions need AVX-512"
)
new = Numbered()

Form = tuple[int, int, int, AttentionForm]
"""Heads, kv heads, head dimension, and what is done with scores."""

PAGES = 700
VARIANTS = tiny_variants(8, pruned={2, 3, 5})
FORMS: dict[str, Form] = {
    "plain": (8, 2, 128, AttentionForm(128**-0.5)),
    "no groups": (3, 3, 64, AttentionForm(0.2)),
    "more heads than are computed together": (14, 2, 64, AttentionForm(0.125)),
    "odd heads, window": (9, 3, 64, AttentionForm(0.125, sliding_window=100)),
    "wide heads, capped": (4, 2, 256, AttentionForm(0.0625, sliding_window=60, softcap=5.0)),
    "no multiple of a vector": (4, 2, 20, AttentionForm(2.0)),
}
IN_CHUNKS = {"plain", "no groups", "more heads than are computed together", "odd heads, window"}
"""Forms that the native function takes for prompts."""
HIDDEN = 48


@pytest.fixture(
    scope="module",
    params=["native_of_this_processor", "native_of_avx512_alone"],
    ids=["this processor", "AVX-512 alone"],
)
def native(request: pytest.FixtureRequest) -> NativeFunctions:
    functions: NativeFunctions = request.getfixturevalue(request.param)
    return functions


def scheduler_of(
    lengths: list[int], layout: PageLayout, tokens_per_step: int = 20_000
) -> Scheduler:
    """Return a scheduler whose next steps are the prompts of both variants."""
    limits = Limits(tokens_per_step=tokens_per_step)
    scheduler = Scheduler(limits, VARIANTS, layout, PagePool(PAGES))
    for length in lengths:
        for variant in ("full", "pruned"):
            scheduler.add(new.request([5] * length, variant))
    return scheduler


def rows(heads: int, count: int, dim: int) -> Tensor:
    """Return [1, heads, rows, dim] whose heads lie side by side, as projections leave them, and
    some of whose scores are far apart."""
    return (3 * torch.randn(1, count, heads, dim)).bfloat16().transpose(1, 2)


class Both:
    """The native backend, and the reference on the same pages in float64."""

    def __init__(self, native: NativeFunctions, form: Form) -> None:
        self.form = form
        _, kv_heads, dim, _ = form
        sizes = [len(group.layers) for group in VARIANTS.groups]
        self.layout = page_layout(sizes, 2 * kv_heads * dim)
        self.pool = torch.randn(PAGES, self.layout.page_elements).bfloat16()
        self.exact = self.pool.double()
        self.native = RowsBackend(native, self.pool, self.layout, VARIANTS, kv_heads)
        self.reference = SdpaBackend(self.exact, self.layout, VARIANTS, kv_heads)

    def batch(self, step: Sequence[Scheduled]) -> Batch:
        return build_batch(step, VARIANTS, self.layout)


def compare(both: Both, batch: Batch, tolerance: float) -> None:
    """Hold a step of the native backend equal to the reference."""
    heads, kv_heads, dim, shape = both.form
    both.native.prepare(batch)
    both.reference.prepare(batch)
    for layer in (0, 2, 7):
        count = batch.attending_rows[layer]
        if count == 0:
            continue
        q, k, v = (rows(n, count, dim) for n in (heads, kv_heads, kv_heads))
        got = both.native(layer, q, k, v, shape)
        expected = both.reference(layer, q.double(), k.double(), v.double(), shape)
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("lengths", [[1, 15, 16, 17, 130], [3000]], ids=["short", "long"])
def test_single_rows_equal_sdpa(native: NativeFunctions, form: Form, lengths: list[int]) -> None:
    both = Both(native, form)
    scheduler = scheduler_of(lengths, both.layout)
    prompts = scheduler.schedule()
    if sum(lengths) < 1000:  # takes long in float64
        compare(both, both.batch(prompts), 1e-2)
    scheduler.advance(prompts)
    for request in scheduler.running:
        request.output.append(7)
    batch = both.batch(scheduler.schedule())
    assert len(batch.token_ids) == len(batch.sequences)
    compare(both, batch, 2**-8)  # rounded once
    assert torch.equal(both.pool.double(), both.exact), "keys and values are where they belong"


def test_repeated_steps_equal_sdpa(native: NativeFunctions) -> None:
    """What is prepared for a batch holds when its numbers have been counted on."""
    both = Both(native, FORMS["no groups"])
    scheduler = scheduler_of([3, 12], both.layout)
    batches = Batches(VARIANTS, both.layout)
    seen = []
    for _ in range(30):
        step = scheduler.schedule()
        seen.append(batches.of(step))
        compare(both, seen[-1], 1e-2)
        scheduler.advance(step)
        for scheduled in step:
            scheduled.request.output.append(7)
    assert len(set(map(id, seen))) == 2, "the prompts' batch, and that of decoding"
    assert torch.equal(both.pool.double(), both.exact), "keys and values are where they belong"


def steps_of_chunks(layout: PageLayout) -> Iterator[Batch]:
    """Yield steps with beginnings and continuations of prompts, beside single rows."""
    scheduler = scheduler_of([1, 90, 70, 200], layout, tokens_per_step=100)
    for _ in range(6):
        step = scheduler.schedule()
        batch = build_batch(step, VARIANTS, layout)
        assert len(batch.token_ids) > len(batch.sequences)
        yield batch
        scheduler.advance(step)
        for scheduled in step:
            if scheduled.samples:
                scheduled.request.output.append(7)


@pytest.mark.parametrize("form", [FORMS[name] for name in sorted(IN_CHUNKS)], ids=sorted(IN_CHUNKS))
def test_chunks_equal_sdpa(native: NativeFunctions, form: Form) -> None:
    both = Both(native, form)
    for batch in steps_of_chunks(both.layout):
        compare(both, batch, 1e-2)
    assert torch.equal(both.pool.double(), both.exact), "keys and values are where they belong"


@pytest.mark.parametrize("form", [FORMS[name] for name in sorted(set(FORMS) - IN_CHUNKS)])
def test_chunks_of_other_forms_are_the_references(native: NativeFunctions, form: Form) -> None:
    """To the bit, in bfloat16."""
    both = Both(native, form)
    heads, kv_heads, dim, shape = form
    reference = SdpaBackend(both.pool.clone(), both.layout, VARIANTS, kv_heads)
    for batch in steps_of_chunks(both.layout):
        both.native.prepare(batch)
        reference.prepare(batch)
        for layer in (0, 2, 7):
            if count := batch.attending_rows[layer]:
                q, k, v = (rows(n, count, dim) for n in (heads, kv_heads, kv_heads))
                expected = reference(layer, q, k, v, shape)
                assert torch.equal(both.native(layer, q, k, v, shape), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 16, 17])
@pytest.mark.parametrize("shape", [(64, 96), (40, 64), (36, 208), (18, 64)])
def test_products_in_eight_bits_are_those_of_float64(
    native: NativeFunctions, count: int, shape: tuple[int, int]
) -> None:
    """Also where outputs or rows leave the product to torch."""
    levels = torch.randint(-127, 128, shape).to(torch.int8)
    scales = torch.rand(shape[0]).bfloat16()
    inputs = torch.randn(count, 2 * shape[1]).bfloat16()[:, : shape[1]]
    got = native.eight_bit_product(inputs, levels, scales)
    expected = inputs.double() @ levels.double().T * scales.double()
    # Inputs become integers of 16 bits, each off by half a step at most; then outputs are rounded.
    half_a_step = inputs.double().abs().amax(1, keepdim=True) / 32512 / 2
    inexact = half_a_step * levels.double().abs().sum(1) * scales.double()
    assert ((got.double() - expected).abs() <= inexact + expected.abs() * 2**-7).all()


class FourBitProduct(torch.nn.Module):
    """The product that compiled layers call."""

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs, packed, scales_and_zeros = tensors
        return four_bit_rows(inputs[0], packed, scales_and_zeros)[None]


WIDTH, OUTPUTS = 224, 192
"""An odd number of groups of inputs, and of outputs that torch packs together."""


@pytest.fixture(scope="module")
def product(native: NativeFunctions) -> tuple[list[Tensor], Tensor]:
    """What a product in four bits reads, and the weight that it stands for, in float64."""
    if not native.has_four_bits:
        pytest.skip("products in four bits need AVX512_VNNI")
    bits = four_bits(torch.randn(OUTPUTS, WIDTH))
    step_tensors = FourBitLinear(bits, None).step_tensors
    scales, zeros = step_tensors[1].double().transpose(0, 1).unbind(-1)
    levels = bits.levels.double().unflatten(1, (-1, GROUP))  # type: ignore[no-untyped-call]
    return step_tensors, ((levels - 8) * scales[..., None] + zeros[..., None]).flatten(1)


def integer_steps(rows: Tensor) -> Tensor:
    """Return the steps of the integers that rows become, [rows, width], in float64: of 16 bits
    where the rows are few, else of 8, around the middle of each group."""
    groups = rows.double().unflatten(1, (-1, GROUP))  # type: ignore[no-untyped-call]
    if len(rows) <= EXACT_ROWS:
        steps = groups.abs().amax(-1, keepdim=True) / 32767
    else:
        steps = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 254
    return steps.expand(groups.shape).flatten(1)


@pytest.mark.parametrize("count", [*range(1, 38), 48, 49, 64, 65, 96, 97, 98, 300])
def test_products_in_four_bits_are_those_of_float64(
    native: NativeFunctions, product: tuple[list[Tensor], Tensor], count: int
) -> None:
    """Also of rows some of whose numbers are far larger than others, of equal ones and of zeros."""
    step_tensors, weight = product
    rows = torch.randn(count, WIDTH).bfloat16()
    rows[count // 2, 40], rows[0, :GROUP], rows[-1, GROUP : 2 * GROUP] = 3000.0, 0.0, -1.5
    got = native.four_bit_product(rows, *step_tensors).double()
    # Integers are off by half a step at most; then outputs are rounded.
    expected = rows.double() @ weight.T
    inexact = integer_steps(rows) / 2 @ weight.T.abs()
    assert ((got - expected).abs() <= 1.001 * inexact + expected.abs() * 2**-8 + 1e-4).all()


def test_many_rows_are_off_by_no_more_than_eight_bits_are(
    native: NativeFunctions, product: tuple[list[Tensor], Tensor]
) -> None:
    """On average as well: what is rounded away is not of one sign."""
    step_tensors, weight = product
    rows = torch.randn(300, WIDTH).bfloat16()
    expected = rows.double() @ weight.T
    errors = native.four_bit_product(rows, *step_tensors).double() - expected
    variance = (integer_steps(rows) ** 2 / 12) @ weight.T**2 + (expected * 2**-8) ** 2 / 12
    assert errors.square().mean() < 1.1 * variance.mean()
    assert errors.mean().abs() < 0.02 * variance.mean().sqrt()


def test_what_is_no_number_stays_none(
    native: NativeFunctions, product: tuple[list[Tensor], Tensor]
) -> None:
    step_tensors, _ = product
    for count, bad in itertools.product((2, 4, 8, 9, 100), (float("nan"), float("inf"))):
        rows = torch.randn(count, WIDTH).bfloat16()
        rows[1, 3] = bad
        got = native.four_bit_product(rows, *step_tensors)
        assert not got[1].isfinite().any()
        assert got[0].isfinite().all()


def test_compiled_functions_call_products_in_four_bits(
    native: NativeFunctions, product: tuple[list[Tensor], Tensor], tmp_path: Path
) -> None:
    step_tensors, _ = product
    path = tmp_path / "product.pt2"
    inputs = [torch.randn(1, 3, WIDTH).bfloat16()]
    _compile(FourBitProduct(), inputs, step_tensors, path, 2, RowRange("any", 1, 100, 1))
    function = _load(path)
    for count in (1, 8, 100):
        rows = torch.randn(1, count, WIDTH).bfloat16()
        got = function([rows, *step_tensors])[0][0]
        assert torch.equal(got, native.four_bit_product(rows[0], *step_tensors))


def answers(folder: Path | None) -> list[list[int]]:
    """Return what an engine in four bits generates, by native functions if it has a folder."""
    base = wrapped(tiny_model("llama", layers=4))
    quantise(base.model)
    for layer, rank in ((1, None), (2, 5)):
        base.sublayers[layer].substitute = random_substitute(32, rank).bfloat16()
    quantise_substitutes(base)
    variants = tiny_variants(4, pruned={1, 2})
    engine = build_engine(base, variants, EngineConfig(kv_cache_bytes=1 << 22, compiled=folder))
    engine.start()
    requests = [new.request(range(4, 24), v, max_tokens=12) for v in ("full", "pruned")]
    engine.submit(requests)
    for request in requests:
        assert recorder(request).wait(300).reason is FinishReason.LENGTH
    engine.stop()
    return [recorder(request).tokens for request in requests]


def without_compiling_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave layers as they are, whose compiling takes long and has tests of its own; their products
    as well, whose rounding decides what random weights generate."""
    monkeypatch.setattr("server.engine.ahead.CompiledLayers.compile_in_background", lambda *_: None)
    monkeypatch.setattr("server.engine.ahead._compute_any_rows", lambda *_: None)


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str, used: Counter[str]) -> None:
    function = getattr(NativeFunctions, name)

    def counted(*given: object) -> object:
        used[name] += 1
        return function(*given)

    monkeypatch.setattr(NativeFunctions, name, counted)


def test_an_engine_answers_alike_with_and_without(
    native_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiling_layers(monkeypatch)
    used: Counter[str] = Counter()
    for name in ("attend", "substitute"):
        count_calls(monkeypatch, name, used)
    assert answers(native_folder) == answers(None)
    assert used["attend"] > 12
    assert used["substitute"] > 12


def test_without_a_compiler_all_runs_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_compiling_layers(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native_functions(tmp_path) is None
    assert "without native functions" in caplog.text
    assert answers(tmp_path) == answers(None)


def test_a_broken_compiler_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert native_functions(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_head_computes_by_the_function_it_is_given(native: NativeFunctions) -> None:
    linear = torch.nn.Linear(HIDDEN, 64, bias=False).bfloat16()
    inputs = torch.randn(1, 1, HIDDEN).bfloat16()
    head = EightBitHead(linear)
    plain = head(inputs)
    used: list[int] = []

    def product(*given: Tensor) -> Tensor:
        used.append(1)
        return native.eight_bit_product(*given)

    head.compute_by(product)
    torch.testing.assert_close(head(inputs), plain, rtol=2**-7, atol=0.01)
    assert used == [1]
