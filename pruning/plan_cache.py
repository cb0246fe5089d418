"""PlanCache: the folder of plans on disk, so that the same question about a model is measured once.

A plan comes about in two parts, each only if it is not there yet: the ranking, and the quality of
those depths that somebody asks about. The calibration tokens are made when a part needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from pruning.budget import Budget
from pruning.calibration import (
    DATA_SET,
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    DEFAULT_SEED,
    SELF,
    CalibrationSet,
    Progress,
    calibration_source,
    mixture,
    silent,
)
from pruning.files import write_atomically
from pruning.loading import BaseModel
from pruning.plan import (
    Calibration,
    Plan,
    PlanError,
    SubstitutesRecord,
    digest,
    dtype_name,
    new_plan,
    parse_drop,
    read_plan,
    substitutes_of,
    write_plan,
)
from pruning.search import DEFAULT_EVALUATIONS
from pruning.selection import (
    ALWAYS_KEPT,
    DEFAULT_CANDIDATES,
    DEFAULT_STRATEGY,
    GREEDY,
    Journal,
    NoJournal,
    Ranking,
    Task,
    TriedSet,
)
from pruning.strategies import SEARCH, STRATEGIES, TRYING
from pruning.substitutes import SUFFIX, SubstituteError, SubstituteKind, Substitutes
from pruning.targets import ATTENTION, TARGETS
from pruning.trial import Trial

logger = logging.getLogger(__name__)

_TOKENS = "token_ids"

Origin = Literal["cached", "computed"]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What decides a base model's ranking: the data, the strategy, and what must be kept.

    Raises:
        PlanError: the strategy is not known, or has no use for an option.
    """

    calibration: tuple[str, ...] = (SELF,)
    samples: int = DEFAULT_SAMPLES
    length: int = DEFAULT_LENGTH
    seed: int = DEFAULT_SEED
    strategy: str = DEFAULT_STRATEGY
    target: str = ATTENTION
    """What a step of the ranking drops."""
    protected: frozenset[int] = frozenset()
    candidates: int = DEFAULT_CANDIDATES
    """How many layers each step of a strategy tries, where it tries layers."""
    substitutes: SubstituteKind | None = None
    evaluations: int = DEFAULT_EVALUATIONS
    """How many sets the search strategy tries at most."""
    depth: int | None = None
    """The depth it searches for; None: what is wanted says it."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise PlanError(
                f"strategy {self.strategy!r} is not one of {', '.join(sorted(STRATEGIES))}"
            )
        if self.target not in TARGETS:
            raise PlanError(f"target {self.target!r} is not one of {', '.join(TARGETS)}")
        if self.target != ATTENTION and self.strategy in TRYING:
            raise PlanError(
                f"--strategy {self.strategy} ranks attention only; use --strategy "
                f"{DEFAULT_STRATEGY} with --target {self.target}"
            )
        if self.candidates < 1:
            raise PlanError(f"--candidates must be at least 1, not {self.candidates}")
        if self.evaluations < 1:
            raise PlanError(f"--evaluations must be at least 1, not {self.evaluations}")
        if self.substitutes is not None and self.strategy == SEARCH:
            raise PlanError(
                f"the {SEARCH} strategy drops layers without substitutes; fit them for the plan it "
                "makes by `attndrop heal` (--steps 0 trains nothing)"
            )
        if self.substitutes is not None and self.strategy != GREEDY:
            raise PlanError(
                f"substitutes are fitted as the {GREEDY} strategy goes along; add --strategy "
                f"{GREEDY}"
            )


@dataclass(frozen=True, slots=True)
class Wanted:
    """The depths whose quality somebody asks about."""

    drops: tuple[str, ...] = ()
    """Numbers of layers, or shares of all layers."""
    budget: Budget | None = None
    """As many depths as are needed to choose by it."""

    @classmethod
    def by(cls, choice: str | Budget) -> Wanted:
        """Return what choosing a number of layers, or by a budget, asks about."""
        return cls(budget=choice) if isinstance(choice, Budget) else cls((choice,))

    def along(self, drops: tuple[str, ...]) -> Wanted:
        """Return what is wanted here and these drops too."""
        return replace(self, drops=self.drops + drops)

    def missing(self, plan: Plan) -> frozenset[int]:
        """Return the depths named by number that the plan does not hold the quality of.

        Raises:
            PlanError: as `parse_drop` does.
        """
        depths = {
            parse_drop(drop, layers=plan.whole, most=len(plan.ranking)) for drop in self.drops
        }
        return frozenset(depth for depth in depths if plan.quality(depth) is None)


NOTHING = Wanted()
"""The ranking alone."""


class Measurement:
    """A base model, a request, and the calibration tokens, made when they are first needed."""

    def __init__(
        self,
        base: BaseModel,
        request: PlanRequest,
        progress: Progress,
        kept_in: Path | None = None,
    ) -> None:
        """`kept_in` is a file that the calibration tokens may be in, or that will keep them."""
        self.base = base
        self.request = request
        self.progress = progress
        self._kept_in = kept_in

    @cached_property
    def calibration(self) -> CalibrationSet:
        if self._kept_in is None:
            return self._made()
        if (kept := self._kept(self._kept_in)) is None:
            kept = self._made()
            try:
                write_atomically(self._kept_in, save({_TOKENS: kept.token_ids}))
            except OSError as error:
                raise PlanError(f"cannot write {self._kept_in}: {error.strerror}") from error
        return kept

    def _kept(self, path: Path) -> CalibrationSet | None:
        """Return the tokens that were made before for the same request, None if there are none."""
        request = self.request
        try:
            table = load(path.read_bytes())[_TOKENS]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("making calibration tokens again, since %s is not: %s", path, error)
            return None
        vocabulary = int(self.base.model.config.get_text_config().vocab_size)
        fits = table.dtype == torch.int64 and table.shape == (request.samples, request.length)
        if not fits or not 0 <= int(table.min()) <= int(table.max()) < vocabulary:
            logger.warning("making calibration tokens again, since %s holds others", path)
            return None
        sources = tuple(map(calibration_source, request.calibration))
        return CalibrationSet(table, sources, request.seed if SELF in request.calibration else None)

    def _made(self) -> CalibrationSet:
        return mixture(
            self.request.calibration,
            self.base,
            samples=self.request.samples,
            length=self.request.length,
            seed=self.request.seed,
            progress=self.progress,
        )

    @property
    def record(self) -> Calibration:
        """What a plan says of the calibration tokens."""
        data = self.calibration
        return Calibration(data.sources, data.samples, data.length, data.seed, data.fingerprint)


def compute_plan(
    base: BaseModel, request: PlanRequest, progress: Progress = silent
) -> tuple[Plan, Substitutes | None]:
    """Measure the base model and return its plan, which drops nothing until `with_drop`, with its
    substitutes if the request is for some.

    Raises:
        PlanError: a protected layer does not exist, or a search has no depth.
        CalibrationError: the calibration data is not usable.
        ImportanceError, DivergenceError, SubstituteError: a measured number is not finite.
    """
    return _ranked(Measurement(base, request, progress), NoJournal(), None)


def _ranked(
    measurement: Measurement, journal: Journal, start: Plan | None
) -> tuple[Plan, Substitutes | None]:
    """Rank; `start` is the plan that a search starts from, if there is one already."""
    base, request = measurement.base, measurement.request
    protected = _protected(base, request)
    depth = _depth(base, request, len(protected)) if request.strategy == SEARCH else 0
    choosing, held_out = measurement.calibration.split()
    if start is not None and start.calibration != measurement.record:
        raise _other_tokens(start)
    task = Task(
        base=base,
        target=request.target,
        choosing=choosing,
        held_out=held_out,
        protected=frozenset(protected),
        candidates=request.candidates,
        substitutes=request.substitutes,
        depth=depth,
        evaluations=request.evaluations,
        seed=request.seed,
        start=() if start is None else start.ranking,
    )
    found = STRATEGIES[request.strategy](task, journal, measurement.progress)
    plan = new_plan(
        base,
        request.strategy,
        found.ranking,
        protected,
        measurement.record,
        candidates=request.candidates if request.strategy in TRYING else None,
        substitutes=_substitutes_record(request, found.substitutes),
        held_out=found.held_out,
        searched=found.searched,
        target=request.target,
    )
    return plan, found.substitutes


def _depth(base: BaseModel, request: PlanRequest, protected: int) -> int:
    """Return the depth to search for.

    Raises:
        PlanError: there is none, or no set to choose from.
    """
    most = base.layers - protected
    if request.depth is None or not 1 <= request.depth < most:
        raise PlanError(
            f"--strategy {SEARCH} chooses a set of layers to drop for one depth, 1 to {most - 1} "
            f"of {base.name}, not {request.depth or 0}; give another --drop or a wider budget"
        )
    return request.depth


def _other_tokens(plan: Plan) -> PlanError:
    return PlanError(
        f"plan {plan.id} was made with other calibration tokens than there are now, so that "
        "none are known to be held out; measure again with --force"
    )


def judged(plan: Plan, measurement: Measurement, wanted: Wanted) -> Plan:
    """Return a plan without substitutes with the quality of the wanted depths measured.

    Raises:
        PlanError: a wanted depth is more than the ranking holds, or the tokens are other ones than
            the plan was made with.
        DivergenceError: a logit is not finite.
    """
    missing = wanted.missing(plan)
    settled = wanted.budget is None or plan.deepest(wanted.budget) is not None
    if not missing and settled:
        return plan
    if plan.calibration != measurement.record:
        raise _other_tokens(plan)
    _, held_out = measurement.calibration.split()
    judge = _Judge(plan, Trial(measurement.base, held_out), measurement.progress)
    while wanted.budget is not None and (depths := judge.needed(wanted.budget)):
        judge.measure(depths)
    judge.measure(wanted.missing(judge.plan))
    return judge.plan


class _Judge:
    """Measures more and more depths of a plan."""

    def __init__(self, plan: Plan, trial: Trial, progress: Progress) -> None:
        self.plan = plan.judged(trial.baseline, {})
        self._trial = trial
        self._progress = progress
        self._depth = 0

    def needed(self, budget: Budget) -> list[int]:
        """Return the depths to measure next to choose by a budget, none if enough are known."""
        curve = self.plan.curve
        unknown = [depth for depth, quality in enumerate(curve, start=1) if quality is None]
        return unknown[: budget.depths_needed(curve, self._trial.baseline.perplexity)]

    def measure(self, depths: Collection[int]) -> None:
        """Add the quality of some depths that are not known, each deeper than those before."""
        snapshots = {}
        for depth in sorted(set(depths) - {0}):
            assert depth > self._depth, "what is dropped does not come back"
            more = self.plan.dropped(depth) - self.plan.dropped(self._depth)
            self._trial.drop(dict.fromkeys(more.attention), more.mlps)
            self._depth = depth
            snapshots[depth] = self._trial.snapshot()
        if not snapshots:
            return
        found = self._trial.divergences(list(snapshots.values()))
        qualities = {d: each.quality for d, each in zip(snapshots, found, strict=True)}
        self.plan = self.plan.judged(self._trial.baseline, qualities)
        self._progress("measuring quality", self._depth, len(self.plan.ranking))


def _protected(base: BaseModel, request: PlanRequest) -> tuple[int, ...]:
    last = len(base.sublayers) - 1
    if outside := sorted(layer for layer in request.protected if not 0 <= layer <= last):
        raise PlanError(f"protected layers {outside} do not exist: {base.name} has layers 0-{last}")
    return tuple(sorted(request.protected | {ALWAYS_KEPT}))


def _substitutes_record(
    request: PlanRequest, substitutes: Substitutes | None
) -> SubstitutesRecord | None:
    if substitutes is None:
        return None
    return SubstitutesRecord(str(request.substitutes), substitutes.fingerprint)


class PlanCache:
    """A folder of plans.

    A plan's name is a hash over what decides its ranking: the model's fingerprint and dtype, the
    calibration data (for a file: its content), the strategy and its options, and the protected
    layers. Substitutes lie there under their own fingerprint, calibration tokens under what made
    them (the model's own text takes longer to write than to measure on), and a search that is not
    finished under the name of its plan, with the suffix .partial.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load_or_compute(
        self,
        base: BaseModel,
        request: PlanRequest,
        progress: Progress = silent,
        wanted: Wanted = NOTHING,
    ) -> tuple[Plan, Origin]:
        """Return the plan and where it came from. It drops nothing until `with_drop`.

        An entry that is damaged, or is not the plan its name promises, is measured again with a
        warning in the log. Quality that is wanted and not there yet is measured and kept.

        Raises:
            PlanError: the cache cannot be read or written, or `wanted` asks for too much.
            CalibrationError, ImportanceError, DivergenceError, SubstituteError: as in
                `compute_plan`.
        """
        self._make_folder()
        request = self._at_depth(base, request, progress, wanted)
        measurement = self._measurement(base, request, progress)
        cached = self._cached(base, request)
        plan = self._ranked(measurement) if cached is None else cached
        return self._judged(plan, measurement, wanted), "computed" if cached is None else "cached"

    def compute(
        self,
        base: BaseModel,
        request: PlanRequest,
        progress: Progress = silent,
        wanted: Wanted = NOTHING,
    ) -> Plan:
        """Return a newly measured plan and keep it in place of the cached one, if there is one."""
        self._make_folder()
        if request.strategy == SEARCH:
            self.compute(base, _greedy(request), progress)
        else:
            self._tokens_path(base, request).unlink(missing_ok=True)
        request = self._at_depth(base, request, progress, wanted)
        measurement = self._measurement(base, request, progress)
        _Partial(self._path(base, request), measurement).remove()
        return self._judged(self._ranked(measurement), measurement, wanted)

    def substitutes(self, plan: Plan) -> Substitutes | None:
        """Return the substitutes of a plan of this cache.

        Raises:
            PlanError, SubstituteError: they are missing or damaged.
        """
        if plan.substitutes is None:
            return None
        return substitutes_of(plan, self._substitutes_path(plan.substitutes.fingerprint))

    def calibration_of(self, plan: Plan) -> CalibrationSet | None:
        """Return the very tokens that a plan was measured on, None if they are not kept here."""
        record = plan.calibration
        if record is None:
            return None
        asked = {
            "model": plan.model.fingerprint,
            "dtype": plan.dtype,
            "sources": record.sources,
            "samples": record.samples,
            "length": record.length,
            "seed": record.seed,
        }
        try:
            table = load(self._tokens_file(asked).read_bytes())[_TOKENS]
        except (OSError, SafetensorError, KeyError):
            return None
        found = CalibrationSet(table, record.sources, record.seed)
        return found if found.fingerprint == record.fingerprint else None

    def latest(self, model: str) -> Plan:
        """Return the newest plan kept for the model of that name.

        Raises:
            PlanError: there is none.
        """
        plans = [plan for plan in self._readable() if plan.model.name == model]
        if not plans:
            raise PlanError(
                f"{model!r} is neither a plan file nor a model with a plan in {self.folder}; "
                f"compute one with `attndrop plan --model {model}`"
            )
        return max(plans, key=lambda plan: plan.created)

    def _at_depth(
        self, base: BaseModel, request: PlanRequest, progress: Progress, wanted: Wanted
    ) -> PlanRequest:
        """Return a request that says which depth to search for, if it is for a search: the one that
        is wanted of greedy's plan."""
        choice = wanted.budget or next(iter(wanted.drops), None)
        if request.strategy != SEARCH or request.depth is not None or choice is None:
            return request
        plan, _ = self.load_or_compute(base, _greedy(request), progress, Wanted.by(choice))
        return replace(request, depth=plan.choosing(choice).drop)

    def _measurement(
        self, base: BaseModel, request: PlanRequest, progress: Progress
    ) -> Measurement:
        """Return a measurement that keeps its calibration tokens, if a hub cannot change them."""
        is_fixed = not any(spec.startswith(DATA_SET) for spec in request.calibration)
        return Measurement(
            base, request, progress, self._tokens_path(base, request) if is_fixed else None
        )

    def _tokens_path(self, base: BaseModel, request: PlanRequest) -> Path:
        question = _question(base, request)
        for name in ("strategy", "target", "candidates", "substitutes", "protected", "searched"):
            question.pop(name, None)
        return self._tokens_file(question)

    def _tokens_file(self, question: Mapping[str, Any]) -> Path:
        return self.folder / f"{digest(question)[:16]}.tokens"

    def _cached(self, base: BaseModel, request: PlanRequest) -> Plan | None:
        """Return the plan that answers the request, None if none does."""
        path = self._path(base, request)
        if not self._exists(path):
            return None
        try:
            plan = read_plan(path)
            _check_answers(plan, base, request)
            self.substitutes(plan)
            return plan
        except (PlanError, SubstituteError) as error:
            if isinstance(error.__cause__, OSError) and isinstance(error, PlanError):
                raise
            logger.warning("measuring again, since the cached one does not serve: %s", error)
            return None

    def _ranked(self, measurement: Measurement) -> Plan:
        """Rank, and keep the plan; a search that was broken off goes on."""
        base, request = measurement.base, measurement.request
        path = self._path(base, request)
        partial = _Partial(path, measurement)
        start = None
        if request.strategy == SEARCH:
            start, _ = self.load_or_compute(base, _greedy(request), measurement.progress)
        plan, substitutes = _ranked(measurement, partial, start)
        if substitutes is not None:
            self._write_substitutes(substitutes)
        write_plan(path, plan)
        partial.remove()
        return plan

    def _judged(self, plan: Plan, measurement: Measurement, wanted: Wanted) -> Plan:
        known = judged(plan, measurement, wanted)
        if known is not plan:
            write_plan(self._path(measurement.base, measurement.request), known)
        return known

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(
                f"cannot create the plan cache {self.folder}: {error.strerror}; set "
                "ATTNDROP_CACHE_DIR to a writable folder"
            ) from error

    def _write_substitutes(self, substitutes: Substitutes) -> None:
        path = self._substitutes_path(substitutes.fingerprint)
        try:
            substitutes.write(path)
        except OSError as error:
            raise PlanError(f"cannot write substitutes {path}: {error.strerror}") from error

    def _substitutes_path(self, fingerprint: str) -> Path:
        return self.folder / f"{fingerprint.removeprefix('sha256:')[:16]}{SUFFIX}"

    def _readable(self) -> Iterator[Plan]:
        for path in sorted(self.folder.glob("*.json")):
            try:
                yield read_plan(path)
            except PlanError as error:
                logger.warning("skipped: %s", error)

    def _path(self, base: BaseModel, request: PlanRequest) -> Path:
        return self.folder / f"{digest(_question(base, request))[:16]}.json"

    def _exists(self, path: Path) -> bool:
        try:
            return path.exists()
        except OSError as error:
            raise PlanError(
                f"cannot read the plan cache {self.folder}: {error.strerror}; set "
                "ATTNDROP_CACHE_DIR to a folder of your own"
            ) from error


def _greedy(request: PlanRequest) -> PlanRequest:
    """Return what a search starts from."""
    return replace(request, strategy=GREEDY)


@dataclass(frozen=True, slots=True)
class _Steps:
    """What a search that is not finished has found, and the calibration tokens it used."""

    calibration: str
    ranking: Ranking = ()
    tried: tuple[TriedSet, ...] = ()


_STEPS = TypeAdapter(_Steps)


class _Partial:
    """The journal of a search, in a file beside where its plan will be."""

    def __init__(self, plan_path: Path, measurement: Measurement) -> None:
        self._path = plan_path.with_suffix(".partial")
        self._measurement = measurement

    def load(self) -> Ranking:
        return self._found.ranking

    def save(self, steps: Ranking) -> None:
        self._write(replace(self._found, ranking=steps))

    def load_tried(self) -> tuple[TriedSet, ...]:
        return self._found.tried

    def save_tried(self, tried: tuple[TriedSet, ...]) -> None:
        self._write(replace(self._found, tried=tried))

    @cached_property
    def _found(self) -> _Steps:
        """What the file holds, nothing if it does not belong to this search."""
        nothing = _Steps(self._measurement.record.fingerprint)
        try:
            found = _STEPS.validate_json(self._path.read_bytes(), strict=True, extra="forbid")
        except FileNotFoundError:
            return nothing
        except (OSError, ValidationError) as error:
            logger.warning("starting over, since %s cannot be read: %s", self._path, error)
            return nothing
        if found.calibration != nothing.calibration:
            logger.warning("starting over, since the calibration tokens are other ones now")
            return nothing
        if not self._fits([step.layer for step in found.ranking]) or not all(
            self._fits(each.dropped) for each in found.tried
        ):
            logger.warning("starting over, since %s does not fit the model", self._path)
            return nothing
        return found

    def _fits(self, layers: Sequence[int]) -> bool:
        """Whether these layers could be dropped."""
        kept = set(_protected(self._measurement.base, self._measurement.request))
        droppable = set(range(self._measurement.base.layers)) - kept
        return len(set(layers)) == len(layers) and set(layers) <= droppable

    def _write(self, found: _Steps) -> None:
        try:
            write_atomically(self._path, _STEPS.dump_json(found))
        except OSError as error:
            raise PlanError(f"cannot write {self._path}: {error.strerror}") from error
        self._found = found

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _question(base: BaseModel, request: PlanRequest) -> dict[str, Any]:
    """Return what decides the ranking, in the words of a plan."""
    question: dict[str, Any] = {
        "model": base.fingerprint,
        "dtype": dtype_name(base),
        "sources": tuple(map(calibration_source, request.calibration)),
        "samples": request.samples,
        "length": request.length,
        "seed": request.seed if SELF in request.calibration else None,
        "strategy": request.strategy,
        "candidates": request.candidates if request.strategy in TRYING else None,
        "substitutes": request.substitutes and str(request.substitutes),
        "protected": _protected(base, request),
    }
    if request.strategy == SEARCH:
        question["searched"] = (request.depth, request.evaluations, request.seed)
    if request.target != ATTENTION:
        question["target"] = request.target
    return question


def _check_answers(plan: Plan, base: BaseModel, request: PlanRequest) -> None:
    """Raise PlanError unless `plan` is what computing `request` would give."""
    plan.check_fits(base)
    record, searched = plan.calibration, plan.searched
    answered = {
        "model": plan.model.fingerprint,
        "dtype": plan.dtype,
        "sources": record and record.sources,
        "samples": record and record.samples,
        "length": record and record.length,
        "seed": record and record.seed,
        "strategy": plan.strategy,
        "target": plan.target,
        "candidates": plan.candidates,
        "substitutes": plan.substitutes and plan.substitutes.kind,
        "protected": plan.protected,
        "searched": searched and (searched.depth, searched.evaluations, searched.seed),
    }
    asked = {"target": request.target, **_question(base, request)}
    if wrong := [name for name in asked if answered[name] != asked[name]]:
        raise PlanError(f"plan {plan.id} was made with another {', '.join(wrong)}")
