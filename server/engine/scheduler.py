"""Which requests run in the next step, how many tokens each, and on which pages.

There are no phases: a request has computed some of its tokens, and each step moves it closer to
all of them within a token budget. Prompt chunks, decoding and recomputation after a preemption
are the same thing. Requests that need one token go first, so a long prompt never stops others
from decoding.

A step is of one chain of variants, since a batch needs variants that nest. Chains that have
something to run take turns, each with all of a step's budget; a waiting request leaves what older
ones of other chains need::

    step     1          2        3          4
    chain    0          1        0          1 has nothing: 0
             full pruned  other  full pruned

Two invariants hold between steps: in every chain, each running request is older than each waiting
one, and every page is free, private to one block table, or in one block of the prefix cache. Plain
Python: no tensors, no clocks. What a step costs here grows with the running requests alone, by a
fraction of a microsecond each; see benchmarks/scheduler.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from pruning.variants import Variants
from server.engine.pages import PageLayout, PagePool
from server.engine.prefix import Beginning, PrefixCache, PrefixStats
from server.engine.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on the scheduler."""

    tokens_per_step: int = 512
    tokens_per_prompt_step: int = 0
    """Those of a step while no answer is being written, if more: a longer step computes prompts in
    less time, but whoever is in the middle of an answer waits for all of it."""
    scored_tokens_per_step: int = 256
    """Prompt tokens a step may score: each needs a row of logits over the vocabulary."""
    running: int = 64
    waiting: int = 1024


@dataclass(slots=True)
class Scheduled:
    """A request's share of a step: tokens start to start + count - 1. Changed by the scheduler
    alone, when it repeats the step.

    Not frozen: a step makes one for each request, and frozen ones take four times as long to make.
    """

    request: Request
    start: int
    count: int
    samples: bool
    """Whether the step computes all of its tokens, and so samples the next one."""


class Scheduler:
    """FIFO admission into a set of running requests that share one page pool."""

    def __init__(
        self,
        limits: Limits,
        variants: Variants,
        layout: PageLayout,
        pool: PagePool,
        *,
        prefix_caching: bool = True,
    ) -> None:
        self.limits = limits
        self._layout = layout
        self._pool = pool
        self._chain_of = variants.chain_of
        self._chains = len(variants.chains)
        self._turn = 0
        """The chain that is asked first for the next step."""
        self._groups = {variant.name: variants.groups_of(variant.name) for variant in variants}
        self._prefixes = PrefixCache(pool, layout, self._groups, shares=prefix_caching)
        self._running: dict[Request, None] = {}  # oldest first
        self._waiting: OrderedDict[Request, None] = OrderedDict()  # oldest first
        self._running_of = dict.fromkeys(self._groups, 0)
        self._waiting_of = dict.fromkeys(self._groups, 0)
        self._step: dict[Request, Scheduled] = {}
        self._last: tuple[Scheduled, ...] = ()
        self._repeats = False
        """Whether the next step is the last one, a token further, if there are pages for it."""
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

    def running_of(self, variant: str) -> int:
        return self._running_of[variant]

    def waiting_of(self, variant: str) -> int:
        return self._waiting_of[variant]

    def prefix_stats(self, variant: str) -> PrefixStats:
        """Return a variant's pages and prefix hits as they are counted; not to be changed."""
        return self._prefixes.stats(variant)

    def capacity(self, variant: str) -> int:
        """Return how many tokens of `variant` the whole pool holds."""
        return self._layout.capacity(self._pool.pages, self._groups[variant])

    def add(self, request: Request) -> None:
        """Queue a new request. The caller keeps the queue within `limits.waiting`."""
        self._waiting[request] = None
        self._waiting_of[request.variant] += 1
        self._repeats = False

    def remove(self, request: Request) -> None:
        """Forget a request that ended, wherever it is, and free its pages."""
        self._repeats = False
        if request in self._running:
            del self._running[request]
            self._running_of[request.variant] -= 1
            self._prefixes.release(request)
        else:
            del self._waiting[request]
            self._waiting_of[request.variant] -= 1

    def schedule(self) -> tuple[Scheduled, ...]:
        """Choose the next step. Preempts the youngest requests where pages run out.

        While requests decode, none comes or goes and there are pages, it is the last step, a token
        further: the same tuple. Not while that one is in flight, since its shares move on.
        """
        self.preempted = []
        if self._repeats and self._last[0].request.pending is None and self._move_on():
            return self._last
        tokens = self._tokens_for_step()
        for after in range(self._chains):
            chain = (self._turn + after) % self._chains
            if step := self._schedule_chain(chain, tokens):
                self._turn = (chain + 1) % self._chains
                self._last, self._repeats = step, self._may_repeat(step)
                return step
        return ()

    def _move_on(self) -> bool:
        """Move the last step a token further, if there are pages for it, and return whether."""
        for scheduled in self._last:
            request = scheduled.request
            scheduled.start = start = request.num_computed_tokens
            if start >= request.page_tokens and not self._grow(request, start + 1):
                return False
        return True

    def _may_repeat(self, step: Sequence[Scheduled]) -> bool:
        """Return whether the step after this one is the same, a token further, if nothing else
        happens: every running request gets its next token, and no other can be admitted."""
        may_admit = self._waiting and len(self._running) < self.limits.running
        if may_admit or not len(self._running) == len(step) <= self.limits.tokens_per_step:
            return False
        return all(s.count == 1 and s.samples and s.request.pending is None for s in step)

    def _schedule_chain(self, chain: int, tokens: int) -> tuple[Scheduled, ...]:
        """Choose the next step of a chain, of so many tokens at most. It is empty where the chain
        has nothing to run."""
        self._step = {}
        self._budget = tokens
        self._scored_budget = self.limits.scored_tokens_per_step
        behind: list[Request] = []
        for request in self._running_in(chain):
            if (remaining := request.remaining) > 1:
                behind.append(request)
            elif request in self._running:
                self._continue(request, remaining)
        for request in behind:
            if request in self._running:
                self._continue(request, request.remaining)
        if not self.preempted:
            self._admit(chain)
        return tuple(self._step.values())

    def _tokens_for_step(self) -> int:
        limits = self.limits
        if limits.tokens_per_prompt_step <= limits.tokens_per_step:
            return limits.tokens_per_step
        answers = any(0 < r.num_generated < r.params.max_tokens for r in self._running)
        return limits.tokens_per_step if answers else limits.tokens_per_prompt_step

    def _running_in(self, chain: int) -> tuple[Request, ...]:
        """Return a chain's running requests, oldest first."""
        if self._chains == 1:
            return tuple(self._running)
        return tuple(r for r in self._running if self._chain_of[r.variant] == chain)

    def advance(self, step: Sequence[Scheduled]) -> None:
        """Note that a step is on its way: its keys and values are there for all later steps."""
        for scheduled in step:
            request = scheduled.request
            request.num_computed_tokens += scheduled.count
            if request.num_computed_tokens >= request.block_end:
                self._prefixes.enter(request)

    def check_counts(self) -> None:
        """Check that the numbers of free, cached and owned pages add up; cheap.

        Raises:
            PageLeakError: they do not.
        """
        self._prefixes.check_counts()

    def check(self) -> None:
        """Check the page accounts, page by page.

        Raises:
            PageLeakError: a page is lost or has two owners, or a count is wrong.
        """
        self._prefixes.check(self.running)

    def _continue(self, request: Request, remaining: int) -> None:
        """Schedule a running request, preempting others where pages run out."""
        count = self._share(request, remaining)
        if count == 0:
            return
        end = request.num_computed_tokens + count
        while end > request.page_tokens and not self._grow(request, end):
            if self._preempt_youngest() is request:
                return
        self._put_in_step(request, count, remaining)

    def _preempt_youngest(self) -> Request:
        """Take all pages from the youngest running request and put it back in front of the queue.

        Its tokens stay; those whose blocks are gone when it is admitted are computed again.
        """
        victim, _ = self._running.popitem()
        if undone := self._step.pop(victim, None):
            self._budget += undone.count
        self._prefixes.release(victim)
        victim.preemptions += 1
        self._waiting[victim] = None
        self._waiting.move_to_end(victim, last=False)
        self._running_of[victim.variant] -= 1
        self._waiting_of[victim.variant] += 1
        self.preempted.append(victim)
        return victim

    def _admit(self, chain: int) -> None:
        """Admit a chain's waiting requests in order while budget, places and pages last.

        Those of other chains that are older keep their claim to a place and to pages, so that a
        large request is not overtaken by small ones for ever.
        """
        claimed, admitted = 0, []
        for request in islice(self._waiting, max(0, self.limits.running - len(self._running))):
            if self._chain_of[request.variant] != chain:
                claimed += self._pages_of(request)
                continue
            if not self._budget:
                break
            beginning = self._prefixes.lookup(request)
            remaining = request.num_tokens - beginning.tokens
            count = self._share(request, remaining)
            if count == 0 or not self._fits(request, beginning, claimed):
                break
            admitted.append(request)
            self._running[request] = None
            self._waiting_of[request.variant] -= 1
            self._running_of[request.variant] += 1
            self._prefixes.admit(request, beginning)
            self._grow(request, beginning.tokens + count)
            self._put_in_step(request, count, remaining)
        for request in admitted:
            del self._waiting[request]

    def _share(self, request: Request, remaining: int) -> int:
        """Return how many of the remaining tokens this step's budgets leave for the request."""
        if request.pending is not None and not request.can_run:
            return 0
        count = remaining if remaining < self._budget else self._budget
        if request.params.prompt_logprobs is not None and request.scores_prompt:
            return min(count, self._scored_budget)
        return count

    def _put_in_step(self, request: Request, count: int, remaining: int) -> None:
        """Schedule `count` of the remaining tokens. The request has pages for them."""
        samples = count == remaining and request.params.max_tokens > 0
        self._step[request] = Scheduled(request, request.num_computed_tokens, count, samples)
        self._budget -= count
        if request.params.prompt_logprobs is not None and request.scores_prompt:
            self._scored_budget -= count

    def _pages_of(self, request: Request) -> int:
        """Return how many pages hold all tokens of a request."""
        return sum(
            self._layout.pages_for(request.num_tokens, group)
            for group in self._groups[request.variant]
        )

    def _fits(self, request: Request, beginning: Beginning, claimed: int) -> bool:
        """Return whether there are pages for all tokens of a waiting request, claimed ones left."""
        needed = self._pages_of(request) - beginning.pages
        return needed <= self._prefixes.available - beginning.unused_pages - claimed

    def _grow(self, request: Request, tokens: int) -> bool:
        """Give a running request the pages that it lacks to hold `tokens` tokens, if there are as
        many, and return whether there were."""
        tables = request.pages
        missing = {
            group: max(0, self._layout.pages_for(tokens, group) - len(table))
            for group, table in tables.items()
        }
        if sum(missing.values()) > self._prefixes.available:
            return False
        for group, count in missing.items():
            tables[group].extend(self._prefixes.take(request.variant, count))
        request.page_tokens = min(
            len(table) * self._layout.tokens_per_page[group] for group, table in tables.items()
        )
        return True
