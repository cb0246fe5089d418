"""Which requests run in the next step, how many tokens each, and on which pages.

There are no phases: a request has computed some of its tokens, and each step moves it closer to
all of them within a token budget. Prompt chunks, decoding and recomputation after a preemption
are the same thing. Requests that need one token go first, so a long prompt never stops others
from decoding.

Two invariants hold between steps: every running request is older than every waiting one, and
every page is free or in exactly one block table. Plain Python: no tensors, no clocks.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from pruning.variants import Variants
from server.engine.pages import PageLayout, PagePool
from server.engine.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on the scheduler."""

    tokens_per_step: int = 512
    scored_tokens_per_step: int = 256
    """Prompt tokens a step may score: each needs a row of logits over the vocabulary."""
    running: int = 64
    waiting: int = 1024


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's share of a step: tokens start to start + count - 1."""

    request: Request
    start: int
    count: int
    samples: bool
    """Whether the step computes all of its tokens, and so samples the next one."""


class Scheduler:
    """FIFO admission into a set of running requests that share one page pool."""

    def __init__(
        self, limits: Limits, variants: Variants, layout: PageLayout, pool: PagePool
    ) -> None:
        self.limits = limits
        self._layout = layout
        self._pool = pool
        self._groups = {variant.name: variants.groups_of(variant.name) for variant in variants}
        self._running: dict[Request, None] = {}  # oldest first
        self._waiting: deque[Request] = deque()
        self._step: dict[Request, Scheduled] = {}
        self.preempted: list[Request] = []
        """The requests that the last step preempted."""

    @property
    def running(self) -> tuple[Request, ...]:
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        return tuple(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def pages(self) -> int:
        return self._pool.pages

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def capacity(self, variant: str) -> int:
        """Return how many tokens of `variant` the whole pool holds."""
        return self._layout.capacity(self._pool.pages, self._groups[variant])

    def add(self, request: Request) -> None:
        """Queue a new request. The caller keeps the queue within `limits.waiting`."""
        self._waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request that ended, wherever it is, and free its pages."""
        if request in self._running:
            del self._running[request]
        else:
            self._waiting.remove(request)
        self._release(request)

    def schedule(self) -> tuple[Scheduled, ...]:
        """Choose the next step. Preempts the youngest requests where pages run out."""
        self._step = {}
        self._budget = self.limits.tokens_per_step
        self._scored_budget = self.limits.scored_tokens_per_step
        self.preempted = []
        for request in sorted(self._running, key=lambda r: r.remaining > 1):
            if request in self._running:
                self._continue(request)
        if not self.preempted:
            self._admit()
        return tuple(self._step.values())

    def check(self) -> None:
        """Check the page accounts.

        Raises:
            PageLeakError: a page is lost or has two owners.
        """
        self._pool.check(table for request in self._running for table in request.pages.values())

    def _continue(self, request: Request) -> None:
        """Schedule a running request, preempting others where pages run out."""
        count = self._share(request)
        while count and not self._fits(request, request.num_computed_tokens + count):
            if self._preempt_youngest() is request:
                return
        if count:
            self._put_in_step(request, count)

    def _preempt_youngest(self) -> Request:
        """Take all pages from the youngest running request and put it back in front of the queue.

        Its tokens stay; their keys and values are computed again when it is admitted.
        """
        victim, _ = self._running.popitem()
        if undone := self._step.pop(victim, None):
            self._budget += undone.count
        self._release(victim)
        victim.num_computed_tokens = 0
        victim.preemptions += 1
        self._waiting.appendleft(victim)
        self.preempted.append(victim)
        return victim

    def _admit(self) -> None:
        """Admit waiting requests in order while budget, places and pages last."""
        while self._waiting and len(self._running) < self.limits.running:
            request = self._waiting[0]
            count = self._share(request)
            if count == 0 or not self._fits(request, request.num_tokens):
                return
            self._running[self._waiting.popleft()] = None
            self._put_in_step(request, count)

    def _share(self, request: Request) -> int:
        """Return how many tokens the request gets of what is left of this step's budgets."""
        if not request.can_run:
            return 0
        count = min(request.remaining, self._budget)
        return min(count, self._scored_budget) if request.scores_prompt else count

    def _put_in_step(self, request: Request, count: int) -> None:
        start = request.num_computed_tokens
        for group, missing in self._missing(request, start + count):
            request.pages.setdefault(group, array("i")).extend(self._pool.take(missing))
        completes = start + count == request.num_tokens
        samples = completes and request.params.max_tokens > 0
        self._step[request] = Scheduled(request, start, count, samples)
        self._budget -= count
        if request.scores_prompt:
            self._scored_budget -= count

    def _fits(self, request: Request, tokens: int) -> bool:
        return sum(missing for _, missing in self._missing(request, tokens)) <= self._pool.free

    def _missing(self, request: Request, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield per layer group how many pages the request lacks to hold `tokens` tokens."""
        for group in self._groups[request.variant]:
            owned = len(request.pages.get(group, ()))
            yield group, max(0, self._layout.pages_for(tokens, group) - owned)

    def _release(self, request: Request) -> None:
        for table in request.pages.values():
            self._pool.give_back(table)
        request.pages = {}
