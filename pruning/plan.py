"""Plan: a ranking and how many of its layers to drop, with everything needed to reproduce it.

A plan is a small JSON file that a person can read. This file holds its format, its checks, how it
is computed, and the cache on disk that lets a model be measured once. It knows nothing of serving,
and of how a ranking comes about no more than the strategies' names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from pruning.calibration import (
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    DEFAULT_SEED,
    SELF,
    CalibrationSet,
    Progress,
    calibrate,
    calibration_source,
    silent,
)
from pruning.loading import BaseModel
from pruning.selection import ALWAYS_KEPT, DEFAULT_STRATEGY, STRATEGIES, Ranking

logger = logging.getLogger(__name__)

FORMAT = "attndrop-plan"
VERSION = 1
TARGET = "attention"
DEFAULT_DROP = "25%"
"""What is dropped where nobody says how much."""
MAX_PLAN_BYTES = 1 << 20
MAX_LAYERS = 1024

_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_DROP = re.compile(r"(?P<number>[0-9]{1,9}(\.[0-9]{1,9})?)(?P<percent>%?)")


class PlanError(ValueError):
    """A plan cannot be read, written or computed, or does not fit."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The base model that a plan was made for."""

    name: str
    family: str
    layers: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a plan was measured on; `source`, `samples`, `length` and `seed` reproduce it."""

    source: str
    samples: int
    length: int
    seed: int | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Versions:
    """The software that made a plan."""

    attndrop: str
    torch: str
    transformers: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A ranking of a base model's layers and how many of them to drop.

    Raises:
        PlanError: the parts contradict each other.
    """

    format: str
    version: int
    model: PlannedModel
    target: str
    strategy: str
    calibration: Calibration | None
    """None where nothing was measured: a plan imported from another tool."""
    protected: tuple[int, ...]
    """Layers that the ranking had to leave out, in order; layer 0 is always among them."""
    ranking: Ranking
    drop: int
    dtype: str
    created: str
    versions: Versions

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise PlanError(problem)

    @property
    def id(self) -> str:
        """12 hex digits over all that decides the ranking: not `drop`, `created`, `versions`."""
        content = asdict(self)
        for name in ("drop", "created", "versions"):
            del content[name]
        return _digest(content)[:12]

    def dropping(self, drop: str) -> Self:
        """Return the plan with as many layers dropped as `drop` asks for (see `parse_drop`).

        Raises:
            PlanError: as `parse_drop` does.
        """
        return self.with_drop(parse_drop(drop, layers=self.model.layers, most=len(self.ranking)))

    def with_drop(self, drop: int) -> Self:
        """Return the plan with another number of layers to drop."""
        return replace(self, drop=drop)

    def dropped_layers(self, count: int | None = None) -> frozenset[int]:
        """Return the first `count` layers of the ranking; by default the plan's own count."""
        count = self.drop if count is None else count
        if not 0 <= count <= len(self.ranking):
            raise PlanError(f"cannot drop {count} layers: {_ranked(self)}")
        return frozenset(step.layer for step in self.ranking[:count])

    def kept_layers(self, count: int | None = None) -> frozenset[int]:
        """Return the layers that keep attention when `count` are dropped."""
        return frozenset(range(self.model.layers)) - self.dropped_layers(count)

    def check_fits(self, base: BaseModel) -> None:
        """Raise PlanError unless the plan was made for this very base model."""
        self.check_fits_model(base.name, len(base.sublayers), base.fingerprint)

    def check_fits_model(self, name: str, layers: int, fingerprint: str) -> None:
        """Raise PlanError unless the plan was made for a base model of that fingerprint."""
        if self.model.layers != layers:
            raise PlanError(
                f"plan {self.id} is for {self.model.name} with {self.model.layers} layers, but "
                f"{name} has {layers}; compute a plan for {name}"
            )
        if self.model.fingerprint != fingerprint:
            raise PlanError(
                f"plan {self.id} was made for the weights of {self.model.name} "
                f"({_short(self.model.fingerprint)}), but those of {name} differ "
                f"({_short(fingerprint)}); compute a plan for {name}"
            )


def _problems(plan: Plan) -> Iterator[str]:
    """Yield what is wrong with a plan, most basic first."""
    if (plan.format, plan.version) != (FORMAT, VERSION):
        yield (
            f"its format is {plan.format!r} version {plan.version}, but this release reads "
            f"{FORMAT!r} version {VERSION}"
        )
    if plan.target != TARGET:
        yield f"its target is {plan.target!r}, but only {TARGET!r} can be dropped"
    if not 1 <= plan.model.layers <= MAX_LAYERS:
        yield f"model.layers must be 1 to {MAX_LAYERS}, not {plan.model.layers}"
    if not _CREATED.fullmatch(plan.created):
        yield f"created must be a UTC time like 2026-01-31T12:00:00Z, not {plan.created!r:.40}"
    yield from _fingerprint_problems(plan)
    yield from _layer_problems(plan)
    for step in plan.ranking:
        if step.cost is not None and not math.isfinite(step.cost):
            yield f"the cost of layer {step.layer} is not a finite number"
    if not 0 <= plan.drop <= len(plan.ranking):
        yield f"cannot drop {plan.drop} layers: {_ranked(plan)}"


def _fingerprint_problems(plan: Plan) -> Iterator[str]:
    fingerprints = {"model": plan.model.fingerprint}
    if plan.calibration is not None:
        fingerprints["calibration"] = plan.calibration.fingerprint
    for name, fingerprint in fingerprints.items():
        if not _FINGERPRINT.fullmatch(fingerprint):
            yield f"{name}.fingerprint must be 'sha256:' and 64 hex digits, not {fingerprint!r:.80}"


def _layer_problems(plan: Plan) -> Iterator[str]:
    last = plan.model.layers - 1
    ranked = [step.layer for step in plan.ranking]
    for name, layers in (("ranking", ranked), ("protected", list(plan.protected))):
        for layer in layers:
            if not 0 <= layer <= last:
                yield f"layer {layer} in {name} is not one of the model's layers, 0 to {last}"
            if layers.count(layer) > 1:
                yield f"layer {layer} is listed twice in {name}"
    if ALWAYS_KEPT not in plan.protected:
        yield f"protected must list layer {ALWAYS_KEPT}, which always keeps its attention"
    if both := sorted(set(ranked) & set(plan.protected)):
        yield f"layers {both} are protected, yet the ranking drops them"


def _ranked(plan: Plan) -> str:
    return f"its ranking holds {len(plan.ranking)} of {plan.model.layers} layers"


# How many layers to drop.


def parse_layers(text: str) -> frozenset[int]:
    """Return the layers that `1,2,29` names; none for an empty text.

    Raises:
        PlanError: the text is something else.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise PlanError(f"--protect must be layer indices like '1,2,29', not {text!r}")
    return frozenset(int(part) for part in parts)


def parse_drop(text: str, *, layers: int, most: int) -> int:
    """Return the number of layers that `text` asks to drop.

    Args:
        text: a number of layers ("8"), or a percentage of all layers ("25%"), rounded down so
            that never more is dropped than was asked for.
        layers: how many layers the model has.
        most: how many layers the ranking holds.

    Raises:
        PlanError: malformed, more than `most`, or a percentage that is less than one layer.
    """
    match = _DROP.fullmatch(text.strip())
    if match is None or ("." in match["number"] and not match["percent"]):
        raise PlanError(f"drop must be a number of layers ('8') or a share ('25%'), not {text!r}")
    if not match["percent"]:
        drop = int(match["number"])
    else:
        share = Fraction(match["number"])
        drop = math.floor(share * layers / 100)
        if share and not drop:
            raise PlanError(f"{text} of {layers} layers is less than one layer; drop at least '1'")
    if drop > most:
        raise PlanError(
            f"cannot drop {drop} of {layers} layers: at most {most} can be dropped (layer "
            f"{ALWAYS_KEPT}, protected layers and layers outside the ranking are kept)"
        )
    return drop


# Files.

_PLAN = TypeAdapter(Plan)


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: not readable, larger than 1 MiB, or not a plan; the sentence names the file.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_PLAN_BYTES else b""
    except FileNotFoundError as error:
        raise PlanError(
            f"there is no plan file {str(path)!r}; compute one with `attndrop plan`"
        ) from error
    except OSError as error:
        raise PlanError(
            f"cannot read plan {path}: {error.strerror}; check the file's permissions"
        ) from error
    if size > MAX_PLAN_BYTES:
        raise PlanError(f"plan {path} has {size} bytes; a plan has at most {MAX_PLAN_BYTES}")
    try:
        return _PLAN.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        raise PlanError(f"plan {path} is not usable: {_first_problem(error)}") from error


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan file, whole or not at all.

    Raises:
        PlanError: the file cannot be written.
    """
    try:
        write_atomically(path, plan_json(plan))
    except OSError as error:
        raise PlanError(
            f"cannot write plan {path}: {error.strerror}; choose a folder that exists and is "
            "writable"
        ) from error


def plan_json(plan: Plan) -> str:
    """Return the text of a plan file: indented JSON, one layer of the ranking a line."""
    text = json.dumps(asdict(plan), indent=2, ensure_ascii=False, allow_nan=False)
    return _STEP.sub(lambda match: " ".join(match[0].split()), text) + "\n"


_STEP = re.compile(r'\{\s+"layer": [^}]+\}')


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text`; a reader sees the old content or the new, never a part."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    if isinstance(cause := problem.get("ctx", {}).get("error"), PlanError):
        return str(cause)
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]


# Computing.


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What decides a base model's ranking: the data, the strategy, and what must be kept.

    Raises:
        PlanError: the strategy is not known.
    """

    calibration: str = SELF
    samples: int = DEFAULT_SAMPLES
    length: int = DEFAULT_LENGTH
    seed: int = DEFAULT_SEED
    strategy: str = DEFAULT_STRATEGY
    protected: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise PlanError(
                f"strategy {self.strategy!r} is not one of {', '.join(sorted(STRATEGIES))}"
            )


def compute_plan(base: BaseModel, request: PlanRequest, progress: Progress = silent) -> Plan:
    """Measure the base model and return its plan, which drops nothing until `with_drop`.

    Raises:
        PlanError: a protected layer does not exist.
        CalibrationError: the calibration data is not usable.
        ImportanceError: a score is not finite.
    """
    protected = _protected(base, request)
    calibration = calibrate(
        request.calibration,
        base,
        samples=request.samples,
        length=request.length,
        seed=request.seed,
        progress=progress,
    )
    ranking = STRATEGIES[request.strategy](base, calibration, frozenset(protected), progress)
    return new_plan(base, request.strategy, ranking, protected, _record(calibration))


def new_plan(
    base: BaseModel,
    strategy: str,
    ranking: Ranking,
    protected: tuple[int, ...],
    calibration: Calibration | None,
) -> Plan:
    """Return a plan for `base`, made now, that drops nothing until `with_drop`."""
    return Plan(
        format=FORMAT,
        version=VERSION,
        model=PlannedModel(
            base.name, base.model.config.model_type, len(base.sublayers), base.fingerprint
        ),
        target=TARGET,
        strategy=strategy,
        calibration=calibration,
        protected=protected,
        ranking=ranking,
        drop=0,
        dtype=_dtype(base),
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions=Versions(version("attndrop"), version("torch"), version("transformers")),
    )


def _protected(base: BaseModel, request: PlanRequest) -> tuple[int, ...]:
    last = len(base.sublayers) - 1
    if outside := sorted(layer for layer in request.protected if not 0 <= layer <= last):
        raise PlanError(f"protected layers {outside} do not exist: {base.name} has layers 0-{last}")
    return tuple(sorted(request.protected | {ALWAYS_KEPT}))


def _record(calibration: CalibrationSet) -> Calibration:
    return Calibration(
        calibration.source,
        calibration.samples,
        calibration.length,
        calibration.seed,
        calibration.fingerprint,
    )


def _dtype(base: BaseModel) -> str:
    return str(base.model.dtype).removeprefix("torch.")


# The cache.


class PlanCache:
    """A folder of plans, so that the same question about the same model is measured once.

    An entry's name is a hash over what decides the ranking: the model's fingerprint and dtype, the
    calibration data (for a file: its content), the strategy and the protected layers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load_or_compute(
        self, base: BaseModel, request: PlanRequest, progress: Progress = silent
    ) -> tuple[Plan, Literal["cached", "computed"]]:
        """Return the plan and where it came from. It drops nothing until `with_drop`.

        An entry that is damaged, or is not the plan its name promises, is measured again with a
        warning in the log.

        Raises:
            PlanError: the cache cannot be read or written.
            CalibrationError, ImportanceError: as in `compute_plan`.
        """
        path = self._path(base, request)
        if self._exists(path):
            try:
                plan = read_plan(path)
                _check_answers(plan, base, request)
                return plan, "cached"
            except PlanError as error:
                if isinstance(error.__cause__, OSError):
                    raise
                logger.warning("measuring again, since the cached one does not serve: %s", error)
        return self.compute(base, request, progress), "computed"

    def compute(self, base: BaseModel, request: PlanRequest, progress: Progress = silent) -> Plan:
        """Return a newly measured plan and keep it in place of the cached one, if there is one."""
        path = self._path(base, request)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(
                f"cannot create the plan cache {self.folder}: {error.strerror}; set "
                "ATTNDROP_CACHE_DIR to a writable folder"
            ) from error
        plan = compute_plan(base, request, progress)
        write_plan(path, plan)
        return plan

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

    def _readable(self) -> Iterator[Plan]:
        for path in sorted(self.folder.glob("*.json")):
            try:
                yield read_plan(path)
            except PlanError as error:
                logger.warning("skipped: %s", error)

    def _path(self, base: BaseModel, request: PlanRequest) -> Path:
        return self.folder / f"{_digest(_question(base, request))[:16]}.json"

    def _exists(self, path: Path) -> bool:
        try:
            return path.exists()
        except OSError as error:
            raise PlanError(
                f"cannot read the plan cache {self.folder}: {error.strerror}; set "
                "ATTNDROP_CACHE_DIR to a folder of your own"
            ) from error


def _question(base: BaseModel, request: PlanRequest) -> dict[str, Any]:
    """Return what decides the ranking, in the words of a plan."""
    return {
        "model": base.fingerprint,
        "dtype": _dtype(base),
        "source": calibration_source(request.calibration),
        "samples": request.samples,
        "length": request.length,
        "seed": request.seed if request.calibration == SELF else None,
        "strategy": request.strategy,
        "protected": _protected(base, request),
    }


def _check_answers(plan: Plan, base: BaseModel, request: PlanRequest) -> None:
    """Raise PlanError unless `plan` is what computing `request` would give."""
    plan.check_fits(base)
    record = plan.calibration
    answered = {
        "model": plan.model.fingerprint,
        "dtype": plan.dtype,
        "source": record and record.source,
        "samples": record and record.samples,
        "length": record and record.length,
        "seed": record and record.seed,
        "strategy": plan.strategy,
        "protected": plan.protected,
    }
    asked = _question(base, request)
    if wrong := [name for name in asked if answered[name] != asked[name]]:
        raise PlanError(f"plan {plan.id} was made with another {', '.join(wrong)}")


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _short(fingerprint: str) -> str:
    return fingerprint[: len("sha256:") + 12]
