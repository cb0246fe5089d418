"""A better set of layers for one depth, by swaps from greedy's.

Greedy never takes a step back: a layer that was right to drop third may be wrong among eight. So
swaps are tried, one dropped layer restored and one that is kept dropped, in the manner of EvoPress
(arXiv 2410.14649): several offspring at a time, of which the best becomes the parent if its KL(full
|| pruned) is lower::

    greedy, depth 3     1 5 2 | 4 3 6 7
    offspring           1 5 4     4 for 2
                        1 3 2     3 for 5     best, and lower than the parent's: the next parent

The layers that may come in are those next in greedy's order. Knows no files: the journal keeps
what was tried, and a search that goes on repeats itself without measuring.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product

import torch

from pruning.calibration import Progress
from pruning.selection import (
    GreedySearch,
    Journal,
    NoJournal,
    Ranking,
    Searched,
    Selection,
    Task,
    TriedSet,
    greedy,
)
from pruning.trial import Trial

logger = logging.getLogger(__name__)

DEFAULT_EVALUATIONS = 200
"""Sets that a search tries at most."""

_INCOMING = 2
"""Layers that may come in, as a multiple of the candidates that greedy tries at a step."""

_Set = frozenset[int]


def search(task: Task, journal: Journal, progress: Progress) -> Selection:
    """Swap layers of greedy's set at `task.depth` as long as that lowers the divergence.

    The ranking begins with the set that was found, in the order in which greedy would drop its
    layers, and goes on with the others in greedy's order. Where the set is no better on held-out
    tokens, which did not choose it, the ranking is greedy's.
    """
    start = task.start or greedy(task, NoJournal(), progress).ranking
    order = [step.layer for step in start]
    swaps = _Swaps(task, order, journal, progress)
    best = swaps.best()
    held_out = Trial(task.base, task.held_out)
    before, after = held_out.of_each([order[: task.depth], best])
    is_better = after.kl < before.kl
    if not is_better:
        logger.info("the search found no better set than greedy's for depth %d", task.depth)
    return Selection(
        _ranking(task, order, best, journal, progress) if is_better else start,
        held_out=held_out.baseline,
        searched=Searched(
            task.depth,
            task.evaluations,
            task.seed,
            swaps.tried,
            before,
            after if is_better else None,
        ),
    )


class _Swaps:
    """A search among the sets of one size."""

    def __init__(
        self, task: Task, order: Sequence[int], journal: Journal, progress: Progress
    ) -> None:
        self._task = task
        self._parent: _Set = frozenset(order[: task.depth])
        self._allowed = order[: task.depth + _INCOMING * task.candidates]
        self._generator = torch.Generator().manual_seed(task.seed)
        self._journal = journal
        self._progress = progress
        self._trial = Trial(task.base, task.tried)
        self._known = {frozenset(each.dropped): each.kl for each in journal.load_tried()}
        self._seen: dict[_Set, float] = {}

    @property
    def tried(self) -> int:
        return len(self._seen)

    def best(self) -> _Set:
        """Return the best set that could be found."""
        self._measure([self._parent])
        while self._improve():
            pass
        return self._parent

    def _improve(self) -> bool:
        """Go to a better neighbour; return whether there is one among those that may be tried."""
        neighbours = self._neighbours()
        while neighbours and (left := self._task.evaluations - self.tried) > 0:
            offspring = neighbours[: min(left, self._task.candidates)]
            del neighbours[: len(offspring)]
            self._measure(offspring)
            best = min(offspring, key=lambda each: (self._seen[each], sorted(each)))
            if self._seen[best] < self._seen[self._parent]:
                self._parent = best
                return True
        return False

    def _neighbours(self) -> list[_Set]:
        """Return the sets one swap away that were not tried yet, in an order drawn by the seed."""
        incoming = [layer for layer in self._allowed if layer not in self._parent]
        pairs = product(sorted(self._parent), incoming)
        swapped = [self._parent - {out} | {into} for out, into in pairs]
        found = [each for each in swapped if each not in self._seen]
        order = torch.randperm(len(found), generator=self._generator).tolist()
        return [found[index] for index in order]

    def _measure(self, sets: Sequence[_Set]) -> None:
        if unknown := [each for each in sets if each not in self._known]:
            self._trial.become(self._parent)
            found = self._trial.of_each(unknown)
            self._known |= {each: q.kl for each, q in zip(unknown, found, strict=True)}
            self._journal.save_tried(
                tuple(TriedSet(tuple(sorted(each)), kl) for each, kl in self._known.items())
            )
        self._seen |= {each: self._known[each] for each in sets}
        self._progress("swapping layers", self.tried, self._task.evaluations)


def _ranking(
    task: Task, order: Sequence[int], first: _Set, journal: Journal, progress: Progress
) -> Ranking:
    """Return a ranking that begins with a set, and what each of its depths costs."""
    inside = [layer for layer in order if layer in first]
    outside = [layer for layer in order if layer not in first]
    ordering = GreedySearch(task, progress)
    ordering.resume(journal.load())
    while len(ordering.steps) < len(order):
        left = [layer for layer in inside if layer not in ordering.dropped]
        ordering.step(left[: task.candidates] or [outside[len(ordering.steps) - len(inside)]])
        journal.save(tuple(ordering.steps))
        progress("ordering layers", len(ordering.steps), len(order))
    return tuple(ordering.steps)
