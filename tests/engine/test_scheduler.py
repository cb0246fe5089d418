"""The scheduler and its pages under random traffic, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pruning.variants import Variants
from server.config import Settings
from server.engine.batch import Batch, Batches, build_batch
from server.engine.pages import PageLayout, PagePool, page_layout
from server.engine.request import Event, Request, SamplingParams
from server.engine.scheduler import Limits, Scheduled, Scheduler
from tests.engine.tiny_engine import tiny_variants


class Offer(NamedTuple):
    variants: Variants
    layout: PageLayout
    pages: int


NESTED = Offer(
    tiny_variants(5, pruned={2, 3, 4}, light={4}),
    PageLayout(tokens_per_page=(2, 2, 4), page_elements=16),
    32,
)
"""Small pages: blocks are 4 tokens of `full` and 2 of the others."""
CROSSED = Offer(
    tiny_variants(5, pruned={2, 3, 4}, light={4}, other={1, 3}, third={1, 2}),
    PageLayout(tokens_per_page=(2, 4, 2, 4, 4), page_elements=16),
    56,
)
"""Three chains: full, light, pruned; other; third."""
VARIANTS, LAYOUT, _ = NESTED
LIMITS = Limits(
    tokens_per_step=11,
    tokens_per_prompt_step=17,
    scored_tokens_per_step=5,
    running=4,
    waiting=100,
)
NARROW = replace(LIMITS, tokens_per_step=3)
"""Steps in which not all running requests have a place."""


class NoSink:
    def put(self, event: Event) -> None:
        raise AssertionError("the scheduler sends no events")


def tokens_of(request: Request) -> tuple[int, ...]:
    """Return a request's tokens, the pending one included, which the tests know beforehand."""
    pending = () if request.pending is None else (next_token(request),)
    return (*request.prompt, *request.output, *pending)


def next_token(request: Request) -> int:
    """Some requests go on alike, others do not."""
    return 6 + len(request.prompt) % 2


def numbers_of(batch: Batch) -> tuple[object, ...]:
    """Return all that a batch says, to be compared."""
    rows = (batch.token_ids, batch.sources, batch.positions, batch.logit_rows)
    of_groups = [(g.pages, g.table_starts, g.slots) for g in batch.groups]
    arrays = (*rows, batch.query_starts, batch.lengths, *(a for own in of_groups for a in own))
    layers = (batch.attending_rows, batch.mlp_rows)
    counts = (batch.variant_sequences, *((g.sequences, g.rows) for g in batch.groups))
    sampling = ([row.generated for row in batch.sampling], batch.sampled, batch.sampling)
    return ([a.tolist() for a in arrays], layers, counts, sampling, batch.sequences, batch.scored)


class Memory:
    """What the pages hold: for each slot, the variant and all tokens up to its own."""

    def __init__(self, offer: Offer) -> None:
        self._variants, self._layout, _ = offer
        self._slots: dict[tuple[int, int], object] = {}

    def compute(self, step: Sequence[Scheduled]) -> None:
        """Write what a step computes and check what it reads, as the device would."""
        for scheduled in step:
            self._write(scheduled, tokens_of(scheduled.request))
        for scheduled in step:
            self._check(scheduled.request, scheduled.start + scheduled.count)

    def spoil(self, step: Sequence[Scheduled]) -> None:
        """Write nonsense where a step would write: it failed halfway."""
        for scheduled in step:
            self._write(scheduled, (-1,) * scheduled.request.num_tokens)

    def _write(self, scheduled: Scheduled, tokens: tuple[int, ...]) -> None:
        request = scheduled.request
        for position in range(scheduled.start, scheduled.start + scheduled.count):
            for slot, content in self._places(request, position, tokens):
                self._slots[slot] = content

    def _check(self, request: Request, count: int) -> None:
        tokens = tokens_of(request)
        for position in range(count):
            for slot, content in self._places(request, position, tokens):
                assert self._slots[slot] == content, f"{request.id} reads what it did not write"

    def _places(
        self, request: Request, position: int, tokens: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, int], object]]:
        for group in self._variants.groups_of(request.variant):
            size = self._layout.tokens_per_page[group]
            page = request.pages[group][position // size]
            yield (page, position % size), (group, request.variant, tokens[: position + 1])


class Traffic(RuleBasedStateMachine):
    """Requests arrive, are stepped as the engine would, end by themselves or are taken away.

    Many begin alike. Where steps overlap, a token is known one step after the one it came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: dict[Request, int] = {}
        self.open: dict[Request, None] = {}
        self.reached: dict[Request, int] = {}
        self.count = 0
        self.in_flight: tuple[Scheduled, ...] = ()

    @initialize(
        offer=st.sampled_from([NESTED, CROSSED]),
        limits=st.sampled_from([LIMITS, LIMITS, NARROW]),
        overlaps=st.booleans(),
        shares=st.sampled_from([True, True, False]),
    )
    def start(self, offer: Offer, limits: Limits, overlaps: bool, shares: bool) -> None:
        self.variants, self.layout, pages = offer
        self.limits = limits
        self.overlaps = overlaps
        self.memory = Memory(offer)
        self.passed_over = dict.fromkeys(range(len(self.variants.chains)), 0)
        self.scheduler = Scheduler(
            limits, self.variants, self.layout, PagePool(pages), prefix_caching=shares
        )
        self.batches = Batches(self.variants, self.layout)

    @rule(
        which=st.integers(0, 100),
        shared=st.sampled_from([0, 4, 8, 13]),
        own=st.integers(1, 9),
        token=st.integers(5, 8),
        output=st.integers(0, 9),
        scored=st.booleans(),
        penalised=st.booleans(),
    )
    def arrive(
        self,
        which: int,
        shared: int,
        own: int,
        token: int,
        output: int,
        scored: bool,
        penalised: bool,
    ) -> None:
        variant = list(self.variants)[which % len(self.variants)].name
        if shared + own + output > self.scheduler.capacity(variant):
            return
        self.count += 1
        params = SamplingParams(
            output,
            prompt_logprobs=0 if scored else None,
            repetition_penalty=1.5 if penalised else 1.0,
        )
        prompt = (5,) * shared + (token,) * own
        request = Request(str(self.count), prompt, variant, params, NoSink(), 0.0)
        self.scheduler.add(request)
        self.arrivals[request] = self.count
        self.open[request] = None

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(list(self.open))))

    @rule()
    def step(self) -> None:
        step = self.schedule()
        self.launch(step)
        self.commit(self.in_flight)
        self.in_flight = step
        if not self.overlaps:
            self.commit_in_flight()

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A step fails halfway; one request of it ends and the others are computed one by one."""
        step = self.schedule()
        self.lay_out(step)
        self.memory.spoil(step)
        self.commit_in_flight()
        guilty = data.draw(st.sampled_from([None, *step]))
        for scheduled in step:
            if scheduled is guilty and scheduled.request in self.open:
                self.end(scheduled.request)
            elif scheduled.request in self.open:
                self.launch((scheduled,))
                self.commit((scheduled,))

    def schedule(self) -> tuple[Scheduled, ...]:
        ready = {self.chain(r) for r in self.scheduler.running if r.remaining and r.can_run}
        answers = any(0 < r.num_generated < r.params.max_tokens for r in self.scheduler.running)
        limits = self.limits
        most = limits.tokens_per_step
        if not answers:
            most = max(most, limits.tokens_per_prompt_step)
        anew = self.chosen_anew()
        step = self.scheduler.schedule()
        assert [(s.request.id, s.start, s.count, s.samples) for s in step] == anew
        self.check_turns(ready, step)
        if not self.in_flight:
            assert bool(step) == bool(self.open), "work stands still"
        assert sum(s.count for s in step) <= most
        assert len({s.request for s in step}) == len(step)
        for scheduled in step:
            request = scheduled.request
            assert scheduled.start == request.num_computed_tokens
            assert 1 <= scheduled.count <= request.remaining
            end = scheduled.start + scheduled.count
            for group in self.variants.groups_of(request.variant):
                assert len(request.pages[group]) >= self.layout.pages_for(end, group)
        return step

    def chosen_anew(self) -> list[tuple[str, int, int, bool]]:
        """Return the next step as it is where none is repeated."""
        scheduler = deepcopy(self.scheduler)
        scheduler._repeats = False
        return [(s.request.id, s.start, s.count, s.samples) for s in scheduler.schedule()]

    def lay_out(self, step: tuple[Scheduled, ...]) -> None:
        """A batch that was counted on is what it would be anew."""
        if step:
            anew = build_batch(step, self.variants, self.layout)
            assert numbers_of(self.batches.of(step)) == numbers_of(anew)

    def chain(self, request: Request) -> int:
        return self.variants.chain_of[request.variant]

    def check_turns(self, ready: set[int], step: tuple[Scheduled, ...]) -> None:
        """A step is of one chain, and none that is ready is passed over for long."""
        chains = {self.chain(s.request) for s in step}
        assert len(chains) <= 1
        preempted = {self.chain(request) for request in self.scheduler.preempted}
        for chain in self.passed_over:
            waits = step and chain in ready - chains - preempted
            self.passed_over[chain] = self.passed_over[chain] + 1 if waits else 0
            assert self.passed_over[chain] < len(self.passed_over), "a chain starves"

    def launch(self, step: tuple[Scheduled, ...]) -> None:
        self.lay_out(step)
        self.memory.compute(step)
        for scheduled in step:
            request, reached = scheduled.request, self.reached.get(scheduled.request, 0)
            assert scheduled.start <= reached or not request.scores_prompt, "a token goes unscored"
            self.reached[request] = max(reached, scheduled.start + scheduled.count)
        self.scheduler.advance(step)
        for place, scheduled in enumerate(step):
            scheduled.request.pending = place if scheduled.samples else None
            scheduled.request.pending_share = scheduled

    def commit_in_flight(self) -> None:
        self.commit(self.in_flight)
        self.in_flight = ()

    def commit(self, step: tuple[Scheduled, ...]) -> None:
        for scheduled in step:
            request = scheduled.request
            if request not in self.open:
                continue
            if scheduled.samples:
                if request.pending_share is scheduled:
                    request.pending = None
                request.output.append(next_token(request))
            end = scheduled.start + scheduled.count
            request.num_scored_tokens = max(
                request.num_scored_tokens, min(end, len(request.prompt) - 1)
            )
            wanted = request.params.max_tokens
            if len(request.output) == wanted and (wanted or request.remaining == 0):
                self.end(request)

    def end(self, request: Request) -> None:
        self.scheduler.remove(request)
        del self.open[request]

    @invariant()
    def pages_have_one_owner(self) -> None:
        self.scheduler.check()

    @invariant()
    def pages_are_counted(self) -> None:
        """A shared page is counted once, and never for another variant."""
        running = self.scheduler.running
        for variant in self.variants:
            own = [request for request in running if request.variant == variant.name]
            pages = {page for r in own for table in r.pages.values() for page in table}
            assert self.scheduler.prefix_stats(variant.name).owned_pages == len(pages)
            assert self.scheduler.running_of(variant.name) == len(own)
            waiting = sum(r.variant == variant.name for r in self.scheduler.waiting)
            assert self.scheduler.waiting_of(variant.name) == waiting

    @invariant()
    def a_variant_owns_pages_of_its_groups_only(self) -> None:
        for request in self.scheduler.running:
            assert set(request.pages) <= set(self.variants.groups_of(request.variant))
        for request in self.scheduler.waiting:
            assert not request.pages
            assert request.num_computed_tokens == 0

    @invariant()
    def running_requests_are_older_than_waiting_ones(self) -> None:
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        assert set(everyone) == set(self.open)
        for chain in self.passed_over:
            order = [self.arrivals[r] for r in everyone if self.chain(r) == chain]
            assert order == sorted(order)

    def teardown(self) -> None:
        """Whatever is open ends within a bounded number of steps, and leaves no page behind."""
        bound = sum(request.num_tokens + request.params.max_tokens for request in self.open) * 20
        for _ in range(bound):
            if self.open:
                self.step()
        assert not self.open, "requests starve"
        assert not self.scheduler.has_work
        self.scheduler.check()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_chains_take_turns_and_one_alone_runs_every_step() -> None:
    variants, layout, _ = CROSSED
    scheduler = Scheduler(Limits(), variants, layout, PagePool(200))
    for name in ("full", "other", "pruned", "other", "third"):
        scheduler.add(Request(name, (5,) * 3, name, SamplingParams(50), NoSink(), 0.0))
    seen = []
    for _ in range(7):
        step = scheduler.schedule()
        seen.append(sorted(s.request.id for s in step))
        for scheduled in step:
            scheduled.request.num_computed_tokens += scheduled.count
            scheduled.request.output.append(9)
        if len(seen) == 4:
            for request in scheduler.running:
                if request.variant not in ("full", "pruned"):
                    scheduler.remove(request)
    turn = [["full", "pruned"], ["other", "other"], ["third"]]
    assert seen == [*turn, turn[0], turn[0], turn[0], turn[0]]


def test_a_large_request_is_not_overtaken_by_small_ones_of_another_chain() -> None:
    variants, layout, _ = CROSSED
    scheduler = Scheduler(Limits(running=9), variants, layout, PagePool(30))
    first = Request("first", (5,) * 16, "other", SamplingParams(9), NoSink(), 0.0)
    scheduler.add(first)
    scheduler.schedule()
    large = Request("large", (5,) * 16, "full", SamplingParams(1), NoSink(), 0.0)
    small = Request("small", (5,) * 2, "other", SamplingParams(1), NoSink(), 0.0)
    scheduler.add(large)
    scheduler.add(small)
    for _ in range(3):
        scheduler.schedule()
        assert scheduler.waiting == (large, small), "small leaves the pages that large waits for"
    scheduler.remove(first)
    (step,) = scheduler.schedule()
    assert step.request is large


def test_a_step_of_decoding_is_repeated_until_a_request_comes_or_goes() -> None:
    """Or there are no pages for it."""
    scheduler = Scheduler(LIMITS, VARIANTS, LAYOUT, PagePool(33))
    for prompt in (3, 5):
        scheduler.add(Request(str(prompt), (5,) * prompt, "full", SamplingParams(99), NoSink(), 0))

    def steps(count: int) -> list[int]:
        """Return which steps of so many are new, by number."""
        last, new = None, []
        for number in range(count):
            step = scheduler.schedule()
            if step is not last:
                new.append(number)
            last = step
            scheduler.advance(step)
            for scheduled in step:
                scheduled.request.output.append(6)
        return new

    assert steps(5) == [0, 1]  # 3 and 5 tokens are computed first
    third = Request("third", (5,), "full", SamplingParams(99), NoSink(), 0)
    scheduler.add(third)
    assert steps(1) == [0]
    scheduler.remove(third)
    assert steps(2) == [0]
    assert steps(3) == [0, 2]
    assert scheduler.preempted, "the longer request's next tokens need pages of the other's"


def test_a_step_of_more_than_may_decode_is_not_repeated() -> None:
    """Four requests of one token each may be computed together, but not go on together."""
    limits = Limits(tokens_per_step=3, tokens_per_prompt_step=4)
    layout = PageLayout(tokens_per_page=(8, 8, 16), page_elements=16)
    scheduler = Scheduler(limits, VARIANTS, layout, PagePool(32))
    for name in "abcd":
        scheduler.add(Request(name, (5,), "full", SamplingParams(99), NoSink(), 0))
    step = scheduler.schedule()
    assert len(step) == 4
    scheduler.advance(step)
    for scheduled in step:
        scheduled.request.output.append(6)
    assert len(scheduler.schedule()) == 3


def test_decoding_goes_before_long_prompts() -> None:
    scheduler = Scheduler(Limits(tokens_per_step=8), VARIANTS, LAYOUT, PagePool(200))
    long = Request("long", (5,) * 100, "full", SamplingParams(4), NoSink(), 0.0)
    short = Request("short", (5,) * 3, "pruned", SamplingParams(4), NoSink(), 0.0)
    scheduler.add(short)
    scheduler.add(long)
    (first, second) = scheduler.schedule()
    assert (first.count, second.count) == (3, 5)
    short.num_computed_tokens, long.num_computed_tokens = 3, 5
    short.output.append(9)
    assert {s.request.id: s.count for s in scheduler.schedule()} == {"short": 1, "long": 7}


def test_steps_are_long_while_nobody_is_in_the_middle_of_an_answer() -> None:
    limits = Limits(tokens_per_step=8, tokens_per_prompt_step=24)
    scheduler = Scheduler(limits, VARIANTS, LAYOUT, PagePool(200))
    for token, (name, answer) in enumerate({"scores": 1, "writes": 3, "waits": 3}.items()):
        prompt = (5 + token,) * 20
        scheduler.add(Request(name, prompt, "full", SamplingParams(answer), NoSink(), 0.0))

    def step() -> dict[str, int]:
        """Schedule and launch a step; its tokens are not known before the next one is scheduled."""
        scheduled = scheduler.schedule()
        scheduler.advance(scheduled)
        for place, share in enumerate(scheduled):
            request = share.request
            if request.pending is not None:
                request.output.append(9)
            request.pending = place if share.samples else None
        return {share.request.id: share.count for share in scheduled}

    assert step() == {"scores": 20, "writes": 4}
    assert step() == {"writes": 16, "waits": 8}, "what only awaits its last token is no reason"
    assert step() == {"writes": 1, "waits": 7}
    scheduler.remove(next(r for r in scheduler.running if r.id == "writes"))
    assert step() == {"waits": 5}


@pytest.mark.parametrize(
    ("free_gib", "wanted", "limits"),
    [(79, None, (2048, 8192)), (23, None, (2048, 0)), (79, 1024, (1024, 0))],
)
def test_steps_of_prompts_are_long_where_there_is_room_and_nothing_was_said(
    free_gib: int, wanted: int | None, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib << 30, 80 << 30))
    chosen = Settings(max_step_tokens=wanted).engine(torch.device("cuda")).limits
    assert chosen is not None
    assert (chosen.tokens_per_step, chosen.tokens_per_prompt_step) == limits


def test_the_youngest_is_preempted_and_computes_its_tokens_again() -> None:
    variants = tiny_variants()
    scheduler = Scheduler(Limits(), variants, page_layout([4], 4), PagePool(2))
    old, young = (
        Request(name, (5,) * 16, "full", SamplingParams(8), NoSink(), 0.0) for name in "ab"
    )
    scheduler.add(old)
    scheduler.add(young)
    for scheduled in scheduler.schedule():
        scheduled.request.num_computed_tokens = 16
        scheduled.request.output.append(9)
    (step,) = scheduler.schedule()
    assert (step.request, step.count) == (old, 1)
    assert scheduler.preempted == [young]
    assert (young.num_computed_tokens, young.output, young.pages) == (0, [9], {})
    scheduler.remove(old)
    (step,) = scheduler.schedule()
    assert (step.request, step.start, step.count) == (young, 0, 17)
