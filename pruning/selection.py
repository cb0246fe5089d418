"""Calibration tokens -> ranking: the order in which layers would be dropped.

`cosine` is the paper's one-shot rule. `greedy` measures again after every drop: it takes the layer
whose removal, given what is dropped already, raises KL(full || pruned) least. What goes on from
there is in search.py; strategies.py lists them all. Knows nothing of plans or files; a `Journal`
keeps what a long search has found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from pruning.calibration import Progress
from pruning.divergence import Baseline, Quality
from pruning.importance import measure_importance
from pruning.loading import BaseModel
from pruning.residuals import Residuals
from pruning.substitutes import LinearSubstitute, SubstituteKind, Substitutes, fit_linear
from pruning.targets import ATTENTION, JOINED, JOINT
from pruning.trial import Replaced, Trial

logger = logging.getLogger(__name__)

ALWAYS_KEPT = 0
"""Layer 0 keeps its attention in every variant."""

TRIED_TOKENS = {"cpu": 1536, "cuda": 16384}
"""Candidates are tried on so many of the tokens to choose by, since that is what takes long. All of
them fit substitutes, which is cheap and needs many."""

DEFAULT_CANDIDATES = 6
"""Layers that a greedy step tries: those of the lowest importance among the ones left."""


@dataclass(frozen=True, slots=True)
class DropStep:
    """One step of a ranking: the layer dropped next, and what that was measured to cost."""

    layer: int
    cost: float | None
    """The strategy's own measure, lower is better; None where nothing was measured."""
    quality: Quality | None = None
    """On held-out tokens, with this layer and all before it dropped; None where not measured."""
    sublayer: str | None = None
    """Which of the layer's sublayers, in a joint ranking; None where the target says it."""


Ranking = tuple[DropStep, ...]
"""The layers in the order in which they would be dropped."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What a strategy is given."""

    base: BaseModel
    target: str = ATTENTION
    """What a step drops; strategies that try layers know only `attention`."""
    choosing: Tensor
    """[samples, length] token ids to choose by."""
    held_out: Tensor
    """[samples, length] token ids to judge by."""
    protected: frozenset[int]
    candidates: int = DEFAULT_CANDIDATES
    """How many layers a step tries, where the strategy tries layers."""
    substitutes: SubstituteKind | None = None
    depth: int = 0
    """How many layers are dropped in the set to search for, where the strategy is for one depth."""
    evaluations: int = 0
    """How many sets it may try."""
    seed: int = 0
    """Of the order in which it tries them."""
    start: Ranking = ()
    """The ranking it starts from; none: it has to find one."""

    @property
    def tried(self) -> Tensor:
        """Those of `choosing` that candidates are tried on."""
        tokens = TRIED_TOKENS.get(self.base.device.type, TRIED_TOKENS["cpu"])
        return self.choosing[: max(1, tokens // self.choosing.shape[1])]


@dataclass(frozen=True, slots=True)
class Searched:
    """How a set for one depth was searched for, and what that gave over greedy's."""

    depth: int
    evaluations: int
    """How many sets it might try."""
    seed: int
    tried: int
    """How many it tried."""
    greedy: Quality
    """Of greedy's set, on held-out tokens."""
    found: Quality | None
    """Of the set that the ranking begins with; None where no better one was found, so that it is
    greedy's."""


@dataclass(frozen=True, slots=True)
class TriedSet:
    """Dropped layers, and KL(full || pruned) on the tokens that sets are tried on."""

    dropped: tuple[int, ...]
    kl: float


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What a strategy found: all droppable layers in order."""

    ranking: Ranking
    substitutes: Substitutes | None = None
    held_out: Baseline | None = None
    """The full model on the held-out tokens; None where the strategy did not look at them."""
    searched: Searched | None = None


class Journal(Protocol):
    """Keeps what a search that is not finished has found: steps of a ranking, sets of layers."""

    def load(self) -> Ranking:
        """Return the steps found before, none if there are none."""
        ...

    def save(self, steps: Ranking) -> None: ...

    def load_tried(self) -> tuple[TriedSet, ...]:
        """Return the sets tried before, none if there are none."""
        ...

    def save_tried(self, tried: tuple[TriedSet, ...]) -> None: ...


class NoJournal:
    """Keeps nothing."""

    def load(self) -> Ranking:
        return ()

    def save(self, steps: Ranking) -> None:
        pass

    def load_tried(self) -> tuple[TriedSet, ...]:
        return ()

    def save_tried(self, tried: tuple[TriedSet, ...]) -> None:
        pass


Strategy = Callable[[Task, Journal, Progress], Selection]


def rank_by_importance(importance: Sequence[float], protected: frozenset[int]) -> Ranking:
    """Return the layers by rising importance, which is their cost; ties by lower layer index."""
    droppable = set(range(len(importance))) - protected - {ALWAYS_KEPT}
    order = sorted(droppable, key=lambda layer: (importance[layer], layer))
    return tuple(DropStep(layer, importance[layer]) for layer in order)


def cosine(task: Task, journal: Journal, progress: Progress) -> Selection:
    """The paper's one-shot rule: measure every layer once, drop the least important first."""

    def ranked(target: str) -> Ranking:
        scores = measure_importance(task.base, task.choosing, target, progress=progress)
        return rank_by_importance(scores, task.protected)

    if task.target != JOINT:
        return Selection(ranked(task.target))
    steps = [replace(step, sublayer=each) for each in JOINED for step in ranked(each)]
    return Selection(tuple(sorted(steps, key=lambda step: (step.cost or 0.0, step.layer))))


def greedy(task: Task, journal: Journal, progress: Progress) -> Selection:
    """Drop the layer that raises the divergence least, again and again.

    A step's cost is KL(full || pruned) on the tokens that candidates are tried on. With
    substitutes, each candidate is tried with its own, fitted given what is dropped already.
    """
    importance = measure_importance(task.base, task.choosing, progress=progress)
    order = [step.layer for step in rank_by_importance(importance, task.protected)]
    search = GreedySearch(task, progress)
    search.resume(journal.load())
    while left := [layer for layer in order if layer not in search.dropped]:
        search.step(left[: task.candidates])
        journal.save(tuple(search.steps))
        progress("choosing layers", len(search.steps), len(order))
    return search.selection()


class GreedySearch:
    """Drops one layer after the other, each the best of the candidates it is given."""

    def __init__(self, task: Task, progress: Progress) -> None:
        self._task = task
        self._trying = Trial(task.base, task.tried)
        self._judging = Trial(task.base, task.held_out)
        self._fitting = None
        if task.substitutes is not None:
            self._fitting = Residuals(task.base, task.choosing, progress)
        self.steps: list[DropStep] = []
        self.dropped: dict[int, LinearSubstitute | None] = {}

    def resume(self, steps: Ranking) -> None:
        """Take steps found before; their substitutes are fitted again."""
        for step in steps:
            self._take(step.layer, self._fitted(step.layer))
            self.steps.append(step)
        if steps:
            logger.info("going on after %d layers that were chosen before", len(steps))

    def step(self, candidates: Sequence[int]) -> None:
        """Drop the best of the candidates."""
        tried = {layer: self._fitted(layer) for layer in candidates}
        found = self._trying.without_each(tried)
        best = min(candidates, key=lambda layer: (found[layer].kl, layer))
        self._take(best, tried[best])
        self.steps.append(DropStep(best, found[best].kl, self._judging.quality()))

    def selection(self) -> Selection:
        fitted = {layer: each for layer, each in self.dropped.items() if each is not None}
        return Selection(
            tuple(self.steps),
            Substitutes(fitted) if fitted else None,
            self._judging.baseline,
        )

    def _take(self, layer: int, substitute: LinearSubstitute | None) -> None:
        replaced: Replaced = {layer: substitute}
        self._trying.drop(replaced)
        self._judging.drop(replaced)
        if self._fitting is not None:
            self._fitting.drop(replaced)
        self.dropped[layer] = substitute

    def _fitted(self, layer: int) -> LinearSubstitute | None:
        kind = self._task.substitutes
        if kind is None or self._fitting is None:
            return None
        return fit_linear(self._fitting.sublayer_pairs(layer), kind, self._task.base.model.dtype)


DEFAULT_STRATEGY = "cosine"
GREEDY = "greedy"
