"""The prefix cache by itself: what is found, what is kept, what is forgotten first."""

from __future__ import annotations

import pytest

from server.engine.pages import PageLayout, PageLeakError, PagePool
from server.engine.request import Event, Request, SamplingParams
from server.engine.scheduler import Limits, Scheduler
from tests.engine.tiny_engine import tiny_variants

VARIANTS = tiny_variants(pruned={2, 3})
LAYOUT = PageLayout(tokens_per_page=(2, 3), page_elements=16)
"""A block is 6 tokens of `full` (3 + 2 pages) and 2 of `pruned` (1 page)."""


class NoSink:
    def put(self, event: Event) -> None:
        raise AssertionError("the scheduler sends no events")


def scheduler(pages: int = 60, *, prefix_caching: bool = True) -> Scheduler:
    pool = PagePool(pages)
    return Scheduler(Limits(), VARIANTS, LAYOUT, pool, prefix_caching=prefix_caching)


def request(prompt: tuple[int, ...], variant: str = "pruned", scored: int | None = None) -> Request:
    params = SamplingParams(4, prompt_logprobs=scored)
    return Request("", prompt, variant, params, NoSink(), 0.0)


def start(scheduler: Scheduler, *requests: Request) -> list[int]:
    """Run a step and return where each of these new requests started."""
    for each in requests:
        scheduler.add(each)
    step = scheduler.schedule()
    scheduler.advance(step)
    for scheduled in step:
        scheduled.request.output.append(9)
    scheduler.check()
    starts = {scheduled.request: scheduled.start for scheduled in step}
    return [starts[each] for each in requests]


def serve(scheduler: Scheduler, *requests: Request) -> list[int]:
    starts = start(scheduler, *requests)
    for each in requests:
        scheduler.remove(each)
    scheduler.check()
    return starts


def cached(scheduler: Scheduler, prompt: tuple[int, ...]) -> int:
    """Return how many tokens of a prompt could be found now."""
    return scheduler._prefixes.lookup(request(prompt)).tokens


def test_full_blocks_are_found_after_their_request_has_ended() -> None:
    engine = scheduler()
    assert serve(engine, request((1, 2, 3, 4, 5))) == [0]
    assert serve(engine, request((1, 2, 3, 4, 9, 9))) == [4]
    assert serve(engine, request((1, 2, 3, 9, 5))) == [2]
    assert serve(engine, request((9, 2, 3, 4, 5))) == [0]


def test_one_token_is_always_left_to_compute() -> None:
    engine = scheduler()
    serve(engine, request((1, 2, 3, 4)))
    assert serve(engine, request((1, 2, 3, 4))) == [2]
    assert serve(engine, request((1, 2, 3, 4, 5))) == [4]


def test_blocks_are_a_common_multiple_of_the_tokens_per_page() -> None:
    engine = scheduler()
    prompt = tuple(range(20))
    serve(engine, request(prompt, "full"))
    assert serve(engine, request(prompt, "full")) == [18]
    assert serve(engine, request(prompt[:12], "full")) == [6]
    assert engine.prefix_stats("full").cached_pages == 3 * (3 + 2)


def test_variants_share_nothing() -> None:
    engine = scheduler()
    prompt = tuple(range(20))
    serve(engine, request(prompt, "full"))
    assert serve(engine, request(prompt, "pruned")) == [0]
    assert serve(engine, request(prompt, "pruned")) == [18]


def test_a_scored_prompt_is_computed_whole_and_serves_others() -> None:
    engine = scheduler()
    serve(engine, request((1, 2, 3, 4, 5)))
    assert serve(engine, request((1, 2, 3, 4, 5), scored=0)) == [0]
    assert serve(engine, request((7, 2, 3, 4, 5), scored=0)) == [0]
    assert serve(engine, request((7, 2, 3, 4, 5))) == [4]
    assert engine.prefix_stats("pruned").asked_tokens == 10
    assert engine.prefix_stats("pruned").hit_tokens == 4


def test_generated_tokens_are_shared_too() -> None:
    engine = scheduler()
    first = request((1, 2, 3))
    start(engine, first)
    start(engine)
    start(engine)
    engine.remove(first)  # 1 2 3 9 9 are computed
    assert serve(engine, request((1, 2, 3, 9, 9, 9, 9))) == [4]


def test_a_block_is_entered_when_its_last_token_is_known() -> None:
    engine = scheduler()
    ahead = request((1, 2, 3))
    engine.add(ahead)
    engine.advance(engine.schedule())
    ahead.pending = 0
    engine.advance(engine.schedule())  # computes the token that is not known here yet
    assert cached(engine, (1, 2, 3, 0, 5)) == 2
    ahead.output.append(9)
    engine.advance(engine.schedule())
    assert cached(engine, (1, 2, 3, 0, 5)) == 2
    assert cached(engine, (1, 2, 3, 9, 5)) == 4


def test_pages_of_a_shared_beginning_are_counted_once() -> None:
    engine = scheduler()
    prompt = tuple(range(10))
    start(engine, request(prompt))
    start(engine, *(request((*prompt, 7)) for _ in range(3)))
    assert engine.prefix_stats("pruned").owned_pages == 5 + 1 + 3


def test_what_is_computed_twice_in_one_step_is_kept_once() -> None:
    engine = scheduler()
    twins = [request((1, 2, 3, 4, 5)) for _ in range(2)]
    assert start(engine, *twins) == [0, 0]
    assert twins[0].pages[0][:2] == twins[1].pages[0][:2]
    assert engine.prefix_stats("pruned").owned_pages == 2 + 1 + 1


def test_the_least_recently_used_are_forgotten_first_and_ends_before_beginnings() -> None:
    engine = scheduler(pages=10)
    old, new = (1, 1, 1, 1, 1, 1, 1), (2, 2, 2, 2, 2, 2, 2)  # 3 blocks each, and one token
    serve(engine, request(old))
    serve(engine, request(new))
    assert engine.prefix_stats("pruned").cached_pages == 6
    serve(engine, request((3,) * 11))  # needs 6 of 10 pages: 2 more than are free
    assert cached(engine, old) == 2
    assert cached(engine, new) == 6


def test_use_makes_recent() -> None:
    engine = scheduler(pages=10)
    first, second = (1, 1, 1, 1, 1, 1, 1), (2, 2, 2, 2, 2, 2, 2)
    serve(engine, request(first))
    serve(engine, request(second))
    serve(engine, request(first))
    serve(engine, request((3,) * 11))
    assert (cached(engine, first), cached(engine, second)) == (6, 2)


def test_blocks_in_use_are_never_forgotten() -> None:
    engine = scheduler(pages=9)
    holder = request((1, 1, 1, 1, 1, 1, 1))
    start(engine, holder)
    serve(engine, request((2,) * 7))
    serve(engine, request((3,) * 7))
    assert start(engine, request((1, 1, 1, 1, 1, 1, 1))) == [6]


def test_a_preempted_request_comes_back_to_its_own_blocks() -> None:
    engine = scheduler(pages=6)
    old, young = request((1, 1, 1, 1, 1, 1)), request((2, 2, 2, 2, 2, 2))
    start(engine, old, young)
    assert start(engine, *()) == []
    assert engine.preempted == [young]
    engine.remove(old)
    (step,) = engine.schedule()
    assert (step.request, step.start) == (young, 4)  # its third page was taken by `old`


def test_without_caching_nothing_is_kept() -> None:
    engine = scheduler(prefix_caching=False)
    serve(engine, request((1, 2, 3, 4, 5)))
    assert serve(engine, request((1, 2, 3, 4, 5))) == [0]
    assert engine.prefix_stats("pruned").cached_pages == 0


def test_counts_that_do_not_add_up_are_found() -> None:
    pool = PagePool(8)
    engine = Scheduler(Limits(), VARIANTS, LAYOUT, pool)
    serve(engine, request((1, 2, 3, 4, 5)))
    pool.take(1)
    with pytest.raises(PageLeakError, match="of 8 pages, 0 are owned, 2 cached and 5 free"):
        engine.check_counts()
    with pytest.raises(PageLeakError, match="1 are lost"):
        engine.check()
