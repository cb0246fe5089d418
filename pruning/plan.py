"""Plan: a ranking and how many of its layers to drop, with everything needed to reproduce it.

A plan is a small JSON file that a person can read, with the evidence of what dropping costs. This
file holds its format and its checks. It knows nothing of serving, and nothing of how a ranking
comes about.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from pruning.budget import Budget
from pruning.divergence import Baseline, Quality
from pruning.files import write_atomically
from pruning.loading import BaseModel
from pruning.selection import ALWAYS_KEPT, Ranking, Searched
from pruning.substitutes import SUFFIX, SubstituteError, Substitutes, parse_substitutes
from pruning.targets import (
    ATTENTION,
    JOINED,
    JOINT,
    NO_SUBLAYERS,
    TARGETS,
    Sublayers,
    sublayers_of,
)

FORMAT = "attndrop-plan"
VERSION = 2
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
    """What a plan was measured on; `sources`, `samples`, `length` and `seed` reproduce it."""

    sources: tuple[str, ...]
    samples: int
    length: int
    seed: int | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class HealedOn:
    """A source that substitutes were trained on, and what that gave on a part of it held out."""

    source: str
    """`self`, or a file's name and the hash of its content."""
    fingerprint: str
    """Over the very tokens, those that the full model wrote included."""
    tokens: int
    """Predicted ones in the part to train on."""
    held_out: Baseline
    """The full model on the part held out."""
    before: Quality
    """Of the plan that was healed, at the same depth."""
    after: Quality


@dataclass(frozen=True, slots=True)
class Healed:
    """How substitutes were trained together, for one depth."""

    drop: int
    """The depth."""
    steps: int
    """0: they were fitted together in closed form, and not trained."""
    tokens: int
    """Predicted ones that were trained on, repetitions included."""
    learning_rate: float
    batch: int
    length: int
    seed: int
    seconds: float
    """Of training."""
    dtype: str
    on: tuple[HealedOn, ...]


@dataclass(frozen=True, slots=True)
class SubstitutesRecord:
    """What stands in dropped sublayers' places; the tensors lie beside the plan."""

    kind: str
    fingerprint: str
    healed: Healed | None = None
    """None: each was fitted given the layers ranked before."""


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
    """What a step of the ranking drops, one of `targets.TARGETS`."""
    strategy: str
    candidates: int | None
    """How many layers each step tried; None where the strategy tries none."""
    substitutes: SubstitutesRecord | None
    """None: dropped sublayers are skipped."""
    calibration: Calibration | None
    """None where nothing was measured: a plan imported from another tool."""
    held_out: Baseline | None
    """The full model on the calibration tokens that judged the ranking and did not choose it; None
    where no depth was judged yet."""
    protected: tuple[int, ...]
    """Layers that the ranking had to leave out, in order; layer 0 is always among them."""
    ranking: Ranking
    drop: int
    budget: Budget | None
    """What chose `drop`; None where a number was asked for."""
    dtype: str
    created: str
    versions: Versions
    searched: Searched | None = None
    """How the set for one depth was searched for; None where the strategy ranks all depths."""

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise PlanError(problem)

    @property
    def id(self) -> str:
        """12 hex digits over all that decides what is dropped at each depth: not `drop` and what
        chose it, not `created` and `versions`, not the quality nor how it was searched for."""
        content = asdict(self)
        for name in ("drop", "budget", "held_out", "created", "versions", "searched"):
            del content[name]
        for step in content["ranking"]:
            del step["quality"]
            if step["sublayer"] is None:
                del step["sublayer"]  # as in plans from before there was such a field
        if content["substitutes"] is not None:
            del content["substitutes"]["healed"]  # the fingerprint covers what came of it
        return digest(content)[:12]

    def dropping(self, drop: str) -> Self:
        """Return the plan with as many layers dropped as `drop` asks for (see `parse_drop`).

        Raises:
            PlanError: as `parse_drop` does.
        """
        return self.with_drop(parse_drop(drop, layers=self.whole, most=len(self.ranking)))

    def with_drop(self, drop: int) -> Self:
        """Return the plan with another number of layers to drop."""
        return replace(self, drop=drop, budget=None)

    def choosing(self, choice: str | Budget) -> Self:
        """Return the plan with as many layers dropped as a number, a share or a budget says.

        Raises:
            PlanError: as `dropping` and `within` do.
        """
        return self.within(choice) if isinstance(choice, Budget) else self.dropping(choice)

    def within(self, budget: Budget) -> Self:
        """Return the plan with the most layers dropped that stay inside a budget.

        Raises:
            PlanError: the quality of too few depths was measured.
        """
        if (drop := self.deepest(budget)) is None:
            raise PlanError(
                f"plan {self.id} does not say what enough of its depths cost to choose by a budget "
                f"({budget}); measure them with `attndrop plan`, or give a number of layers"
            )
        return replace(self, drop=drop, budget=budget)

    def deepest(self, budget: Budget) -> int | None:
        """Return the most layers that stay inside a budget; None where too few depths were
        measured to say."""
        if self.held_out is None:
            return None
        return budget.deepest(self.curve, self.held_out.perplexity)

    @property
    def curve(self) -> tuple[Quality | None, ...]:
        """The quality of each depth, from one layer dropped on; None where not measured."""
        return tuple(step.quality for step in self.ranking)

    def judged(self, held_out: Baseline, qualities: Mapping[int, Quality]) -> Self:
        """Return the plan with the quality of more depths; depth 1 drops one layer."""
        ranking = tuple(
            replace(step, quality=qualities.get(depth, step.quality))
            for depth, step in enumerate(self.ranking, start=1)
        )
        return replace(self, ranking=ranking, held_out=held_out)

    def healed(
        self,
        record: SubstitutesRecord,
        held_out: Baseline | None,
        qualities: Mapping[int, Quality],
    ) -> Self:
        """Return the plan with substitutes that were trained now for its `drop`. What was known of
        the quality of depths is no longer true; `qualities` are of these substitutes."""
        ranking = tuple(replace(step, quality=None) for step in self.ranking)
        forgotten = replace(
            self,
            substitutes=record,
            ranking=ranking,
            held_out=None,
            created=_now(),
            versions=versions(),
        )
        return forgotten if held_out is None else forgotten.judged(held_out, qualities)

    def quality(self, count: int | None = None) -> Quality | None:
        """Return what dropping `count` layers (by default the plan's own number) costs on held-out
        tokens; None where that was not measured."""
        count = self.drop if count is None else count
        if count == 0:
            if self.held_out is None:
                return None
            return Quality(kl=0.0, agreement=1.0, perplexity=self.held_out.perplexity)
        return self.ranking[count - 1].quality

    @property
    def whole(self) -> int:
        """How many there are of what a step drops; a share to drop is one of these."""
        return self.model.layers * (len(JOINED) if self.target == JOINT else 1)

    def dropped(self, count: int | None = None) -> Sublayers:
        """Return what the first `count` steps of the ranking drop; by default the plan's own
        count."""
        count = self.drop if count is None else count
        if not 0 <= count <= len(self.ranking):
            raise PlanError(f"cannot drop {count} layers: {_ranked(self)}")
        steps = self.ranking[:count]
        each = (sublayers_of(step.sublayer or self.target, step.layer) for step in steps)
        return reduce(Sublayers.__or__, each, NO_SUBLAYERS)

    def dropped_layers(self, count: int | None = None) -> frozenset[int]:
        """Return the layers whose attention is dropped by the first `count` steps of the ranking;
        by default the plan's own count."""
        return self.dropped(count).attention

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
                f"({short(self.model.fingerprint)}), but those of {name} differ "
                f"({short(fingerprint)}); compute a plan for {name}"
            )


def _problems(plan: Plan) -> Iterator[str]:
    """Yield what is wrong with a plan, most basic first."""
    if (plan.format, plan.version) != (FORMAT, VERSION):
        yield _foreign_format(plan.format, plan.version)
    if plan.target not in TARGETS:
        yield f"its target is {plan.target!r:.40}, which is not one of {', '.join(TARGETS)}"
    if not 1 <= plan.model.layers <= MAX_LAYERS:
        yield f"model.layers must be 1 to {MAX_LAYERS}, not {plan.model.layers}"
    if not _CREATED.fullmatch(plan.created):
        yield f"created must be a UTC time like 2026-01-31T12:00:00Z, not {plan.created!r:.40}"
    yield from _fingerprint_problems(plan)
    yield from _layer_problems(plan)
    for step in plan.ranking:
        if step.cost is not None and not math.isfinite(step.cost):
            yield f"the cost of layer {step.layer} is not a finite number"
        if step.quality is not None and not _is_possible(step.quality):
            yield f"the quality at layer {step.layer} is not one that can be measured"
    yield from _evidence_problems(plan)
    if not 0 <= plan.drop <= len(plan.ranking):
        yield f"cannot drop {plan.drop} layers: {_ranked(plan)}"


def _foreign_format(name: Any, number: Any) -> str:
    return (
        f"its format is {name!r:.40} version {number!r:.20}, but this release reads {FORMAT!r} "
        f"version {VERSION}; compute it again with `attndrop plan`"
    )


def _is_possible(quality: Quality) -> bool:
    return (
        math.isfinite(quality.kl)
        and 0 <= quality.agreement <= 1
        and math.isfinite(quality.perplexity)
        and quality.perplexity > 0
    )


def _evidence_problems(plan: Plan) -> Iterator[str]:
    if plan.held_out is None:
        if any(step.quality is not None for step in plan.ranking):
            yield "its ranking holds quality, but held_out does not say on what it was measured"
    elif plan.held_out.tokens < 1 or not 0 < plan.held_out.perplexity < math.inf:
        yield "held_out must hold at least one token and a perplexity above 0"
    if plan.candidates is not None and plan.candidates < 1:
        yield f"candidates must be at least 1, not {plan.candidates}"
    if plan.searched is not None:
        yield from _searched_problems(plan, plan.searched)
    if plan.substitutes is not None:
        try:
            if parse_substitutes(plan.substitutes.kind) is None:
                yield "substitutes must be null where there are none"
        except SubstituteError as error:
            yield str(error)
        if plan.substitutes.healed is not None:
            yield from _healed_problems(plan, plan.substitutes.healed)


def _searched_problems(plan: Plan, searched: Searched) -> Iterator[str]:
    if not 1 <= searched.depth <= len(plan.ranking):
        yield f"it was searched for {searched.depth} dropped layers: {_ranked(plan)}"
    if min(searched.evaluations, searched.tried) < 1:
        yield "searched.evaluations and searched.tried must be at least 1"
    for quality in (searched.greedy, searched.found):
        if quality is not None and not _is_possible(quality):
            yield "the quality in searched is not one that can be measured"


def _healed_problems(plan: Plan, healed: Healed) -> Iterator[str]:
    if not 1 <= healed.drop <= len(plan.ranking):
        yield f"its substitutes were healed for {healed.drop} dropped layers: {_ranked(plan)}"
    if min(healed.steps, healed.tokens) < 0 or not 0 <= healed.seconds < math.inf:
        yield "healed.steps, tokens and seconds must be 0 or more"
    if min(healed.batch, healed.length) < 1 or not 0 < healed.learning_rate < math.inf:
        yield "healed.batch, length and learning_rate must be above 0"
    for each in healed.on:
        if not _is_possible(each.before) or not _is_possible(each.after):
            yield f"the quality on {each.source!r:.80} is not one that can be measured"
        if each.held_out.tokens < 1 or not 0 < each.held_out.perplexity < math.inf:
            yield "healed.on.held_out must hold at least one token and a perplexity above 0"


def _fingerprint_problems(plan: Plan) -> Iterator[str]:
    fingerprints = {"model": plan.model.fingerprint}
    if plan.calibration is not None:
        fingerprints["calibration"] = plan.calibration.fingerprint
    if plan.substitutes is not None:
        fingerprints["substitutes"] = plan.substitutes.fingerprint
        healed = plan.substitutes.healed
        for index, each in enumerate(healed.on if healed is not None else ()):
            fingerprints[f"substitutes.healed.on.{index}"] = each.fingerprint
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
    steps = [(step.layer, step.sublayer) for step in plan.ranking]
    for layer in sorted({layer for layer, each in steps if steps.count((layer, each)) > 1}):
        yield f"layer {layer} is listed twice in ranking"
    for layer in sorted({each for each in plan.protected if plan.protected.count(each) > 1}):
        yield f"layer {layer} is listed twice in protected"
    allowed = JOINED if plan.target == JOINT else (None,)
    for step in plan.ranking:
        if step.sublayer not in allowed:
            yield (
                f"layer {step.layer} in ranking names sublayer {step.sublayer!r:.40}, which a plan "
                f"for {plan.target!r:.40} does not do like that"
            )
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


def is_drop(text: str) -> bool:
    """Whether a text says how many layers to drop, as `parse_drop` reads it."""
    return _DROP.fullmatch(text.strip()) is not None


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
        _check_format(content)
        return _PLAN.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        raise PlanError(f"plan {path} is not usable: {_first_problem(error)}") from error
    except PlanError as error:
        raise PlanError(f"plan {path} is not usable: {error}") from error


def read_with_substitutes(path: Path) -> tuple[Plan, Substitutes | None]:
    """Read a plan file, and the substitutes beside it if the plan has some.

    Raises:
        PlanError: as `read_plan`, or the substitutes are not the plan's.
        SubstituteError: their file is missing or not usable.
    """
    plan = read_plan(path)
    return plan, substitutes_of(plan, substitutes_path(path))


def substitutes_of(plan: Plan, path: Path) -> Substitutes | None:
    """Return the plan's substitutes from their file, None if it has none.

    Raises:
        PlanError: the file holds others.
        SubstituteError: it is missing or not usable.
    """
    if plan.substitutes is None:
        return None
    substitutes = Substitutes.read(path)
    if substitutes.fingerprint != plan.substitutes.fingerprint:
        raise PlanError(
            f"the substitutes in {path} ({short(substitutes.fingerprint)}) are not those of plan "
            f"{plan.id} ({short(plan.substitutes.fingerprint)}); keep the two files together"
        )
    return substitutes


def substitutes_path(plan_path: Path) -> Path:
    """Return where the substitutes of a plan file lie: beside it, under its name."""
    return plan_path.with_suffix(SUFFIX)


def _check_format(content: bytes) -> None:
    """Refuse another version of the format before its fields are looked at."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return  # the parser says it better
    if not isinstance(found, dict) or not {"format", "version"} <= found.keys():
        return
    if (found["format"], found["version"]) != (FORMAT, VERSION):
        raise PlanError(_foreign_format(found["format"], found["version"]))


def write_plan(path: Path, plan: Plan, substitutes: Substitutes | None = None) -> None:
    """Write a plan file, whole or not at all, and before it the substitutes beside it.

    Raises:
        PlanError: the file cannot be written.
    """
    try:
        if substitutes is not None:
            if path.suffix == SUFFIX:
                raise PlanError(f"a plan's name cannot end in {SUFFIX}, as {path} does; use .json")
            substitutes.write(substitutes_path(path))
        write_atomically(path, plan_json(plan).encode())
    except OSError as error:
        raise PlanError(
            f"cannot write plan {path}: {error.strerror}; choose a folder that exists and is "
            "writable"
        ) from error


def plan_json(plan: Plan) -> str:
    """Return the text of a plan file: indented JSON, one layer of the ranking a line."""
    content = asdict(plan)
    for step in content["ranking"]:
        if step["sublayer"] is None:
            del step["sublayer"]
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return _STEP.sub(lambda match: " ".join(match[0].split()), text) + "\n"


_STEP = re.compile(r'\{\s+"layer": (?:[^{}]|\{[^{}]*\})+\}')


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    if isinstance(cause := problem.get("ctx", {}).get("error"), PlanError):
        return str(cause)
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]


# Making one.


def new_plan(
    base: BaseModel,
    strategy: str,
    ranking: Ranking,
    protected: tuple[int, ...],
    calibration: Calibration | None,
    *,
    candidates: int | None = None,
    substitutes: SubstitutesRecord | None = None,
    held_out: Baseline | None = None,
    searched: Searched | None = None,
    target: str = ATTENTION,
) -> Plan:
    """Return a plan for `base`, made now, that drops nothing until `with_drop`."""
    return Plan(
        format=FORMAT,
        version=VERSION,
        model=PlannedModel(
            base.name, base.model.config.model_type, len(base.sublayers), base.fingerprint
        ),
        target=target,
        strategy=strategy,
        candidates=candidates,
        substitutes=substitutes,
        calibration=calibration,
        held_out=held_out,
        protected=protected,
        ranking=ranking,
        drop=0,
        budget=None,
        dtype=dtype_name(base),
        created=_now(),
        versions=versions(),
        searched=searched,
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> Versions:
    """Return the software that runs here."""
    return Versions(version("attndrop"), version("torch"), version("transformers"))


def dtype_name(base: BaseModel) -> str:
    """Return what the base model computes in, as plans name it."""
    return str(base.model.dtype).removeprefix("torch.")


def digest(content: Mapping[str, Any]) -> str:
    """Return the hash of what JSON can hold."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def short(fingerprint: str) -> str:
    """Return as much of a fingerprint as a sentence needs."""
    return fingerprint[: len("sha256:") + 12]
