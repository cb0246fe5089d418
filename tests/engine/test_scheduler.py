"""The scheduler and its pages under random traffic, without a model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.pages import PagePool, page_layout
from server.engine.request import Event, Request, SamplingParams
from server.engine.scheduler import Limits, Scheduled, Scheduler
from tests.engine.tiny_engine import tiny_variants

VARIANTS = tiny_variants(8, pruned={2, 3, 5, 6}, light={6})
LIMITS = Limits(tokens_per_step=24, scored_tokens_per_step=8, running=4, waiting=100)
PAGES = 12


class NoSink:
    def put(self, event: Event) -> None:
        raise AssertionError("the scheduler sends no events")


class Traffic(RuleBasedStateMachine):
    """Requests arrive, are stepped as the engine would, end by themselves or are taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = page_layout([len(group.layers) for group in VARIANTS.groups], 4)
        self.scheduler = Scheduler(LIMITS, VARIANTS, self.layout, PagePool(PAGES))
        self.arrivals: dict[Request, int] = {}
        self.open: dict[Request, None] = {}
        self.count = 0

    @rule(
        variant=st.sampled_from([variant.name for variant in VARIANTS]),
        prompt=st.integers(1, 60),
        output=st.integers(0, 30),
        scored=st.booleans(),
    )
    def arrive(self, variant: str, prompt: int, output: int, scored: bool) -> None:
        if prompt + output > self.scheduler.capacity(variant):
            return
        self.count += 1
        params = SamplingParams(output, prompt_logprobs=0 if scored else None)
        request = Request(str(self.count), (5,) * prompt, variant, params, NoSink(), 0.0)
        self.scheduler.add(request)
        self.arrivals[request] = self.count
        self.open[request] = None

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.open)))
        self.scheduler.remove(request)
        del self.open[request]

    @rule()
    def step(self) -> None:
        self.run(self.scheduler.schedule())

    def run(self, step: tuple[Scheduled, ...]) -> None:
        assert bool(step) == bool(self.open), "work stands still"
        assert sum(s.count for s in step) <= LIMITS.tokens_per_step
        assert len({s.request for s in step}) == len(step)
        for scheduled in step:
            self.commit(scheduled)

    def commit(self, scheduled: Scheduled) -> None:
        request = scheduled.request
        assert scheduled.start == request.num_computed_tokens
        assert 1 <= scheduled.count <= request.remaining
        end = scheduled.start + scheduled.count
        for group in VARIANTS.groups_of(request.variant):
            assert len(request.pages[group]) >= self.layout.pages_for(end, group)
        request.num_computed_tokens = end
        request.num_scored_tokens = max(
            request.num_scored_tokens, min(end, len(request.prompt) - 1)
        )
        if scheduled.samples:
            request.output.append(7)
        if request.remaining <= 1 and len(request.output) == request.params.max_tokens:
            self.scheduler.remove(request)
            del self.open[request]

    @invariant()
    def pages_have_one_owner(self) -> None:
        self.scheduler.check()

    @invariant()
    def a_variant_owns_pages_of_its_groups_only(self) -> None:
        for request in self.scheduler.running:
            assert set(request.pages) <= set(VARIANTS.groups_of(request.variant))
        for request in self.scheduler.waiting:
            assert not request.pages
            assert request.num_computed_tokens == 0

    @invariant()
    def running_requests_are_older_than_waiting_ones(self) -> None:
        order = [*self.scheduler.running, *self.scheduler.waiting]
        assert [self.arrivals[r] for r in order] == sorted(self.arrivals[r] for r in order)
        assert set(order) == set(self.open)

    def teardown(self) -> None:
        """Whatever is open ends within a bounded number of steps, and leaves no page behind."""
        bound = sum(request.num_tokens + request.params.max_tokens for request in self.open) * 20
        for _ in range(bound):
            if self.open:
                self.run(self.scheduler.schedule())
        assert not self.open, "requests starve"
        assert not self.scheduler.has_work
        self.scheduler.check()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_decoding_goes_before_long_prompts() -> None:
    scheduler = Scheduler(
        Limits(tokens_per_step=8), VARIANTS, page_layout([4, 3, 1], 4), PagePool(64)
    )
    long = Request("long", (5,) * 100, "full", SamplingParams(4), NoSink(), 0.0)
    short = Request("short", (5,) * 3, "pruned", SamplingParams(4), NoSink(), 0.0)
    scheduler.add(short)
    scheduler.add(long)
    (first, second) = scheduler.schedule()
    assert (first.count, second.count) == (3, 5)
    short.num_computed_tokens, long.num_computed_tokens = 3, 5
    short.output.append(9)
    assert {s.request.id: s.count for s in scheduler.schedule()} == {"short": 1, "long": 7}


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
