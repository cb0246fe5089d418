"""Heal: recover what dropping costs at one depth of a plan, without touching the shared weights.

First the closed form: where the plan has no substitutes, maps for all dropped layers are fitted
from the first to the last. Then distillation: they are trained together to match the full model.
The result is a plan with the same ranking, whose substitutes say how they came about, and which no
longer claims what it knew of other depths.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pruning.batches import Batches
from pruning.calibration import SELF, CalibrationSet, Progress, silent
from pruning.checkpoint import Checkpoint
from pruning.coordinates import Trainee
from pruning.corpus import SELF_CHAT, CorpusRequest, Rows, Source, make_corpus
from pruning.distil import Distillation, Distilled, HealError, Training, check_dtype
from pruning.divergence import Baseline, Quality
from pruning.fitting import fit_in_order, input_statistics
from pruning.held_out import HeldOut
from pruning.loading import BaseModel
from pruning.plan import Healed, HealedOn, Plan, SubstitutesRecord, digest, dtype_name
from pruning.substitutes import (
    SUFFIX,
    LinearSubstitute,
    SubstituteError,
    SubstituteKind,
    Substitutes,
    parse_substitutes,
)
from pruning.targets import ATTENTION
from pruning.trial import Trial
from pruning.twin import Twin

logger = logging.getLogger(__name__)

_TOKENS_A_DIMENSION = 16
"""How many tokens, per number of the residual stream, say what substitutes' inputs are like."""
_FULL_RANK = SubstituteKind(None)


@dataclass(frozen=True, slots=True)
class HealRequest:
    """What to do with a plan."""

    drop: int
    """The depth to heal at."""
    corpus: CorpusRequest
    training: Training
    kind: SubstituteKind | None = None
    """Of substitutes that are fitted; None: the plan's own, else linear of full rank."""
    refit: bool = False
    """Fit new ones where the plan has some."""
    fit_tokens: int = 100_000
    """How many training tokens the closed form takes at most."""
    depths: tuple[int, ...] = ()
    """Other depths to measure again."""


@dataclass(frozen=True, slots=True, eq=False)
class Healing:
    """A healed plan and what it came from."""

    plan: Plan
    substitutes: Substitutes
    fitted: Mapping[str, Quality]
    """On the held-out part of each source, before training."""
    distilled: Distilled
    checkpoint: Checkpoint
    """To be removed when the plan is written."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One healing, prepared: what it is trained and judged on."""

    request: HealRequest
    kind: SubstituteKind
    plan: Plan
    """It drops as many layers as are healed."""
    sources: tuple[Source, ...]
    twin: Twin
    held_out: HeldOut

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that are dropped, from first to last."""
        return self.twin.dropped

    @property
    def training(self) -> list[Rows]:
        """What is trained on, by source."""
        return [each.training for each in self.sources]


class Healer:
    """A base model, a plan of it, and the folder that keeps what takes long."""

    def __init__(
        self,
        base: BaseModel,
        plan: Plan,
        substitutes: Substitutes | None,
        folder: Path,
        progress: Progress = silent,
    ) -> None:
        """Raises PlanError: the plan is for another model."""
        plan.check_fits(base)
        self._base = base
        self._plan = plan
        self._substitutes = substitutes
        self._folder = folder
        self._progress = progress

    def heal(self, request: HealRequest, judging: CalibrationSet | None = None) -> Healing:
        """Fit and train substitutes for a depth.

        Args:
            judging: the tokens that the plan was measured on, if they are at hand. Its held-out
                part judges the result, unless it may have been trained on.

        Raises:
            HealError, PlanError, SubstituteError, CalibrationError, DivergenceError,
                CheckpointError: with one sentence for the user.
        """
        task = self.prepared(request)
        before = task.held_out.qualities(self._standing(task.layers))
        checkpoint = Checkpoint(self._checkpoint_path(task))
        distillation = self._distillation(task, checkpoint)
        distilled = distillation.run()
        healed = self._all(distilled.substitutes, task.kind)
        record = self._record(task, healed, before, distilled)
        baseline, qualities = self._judged(task, healed, judging)
        plan = task.plan.healed(record, baseline, qualities)
        return Healing(plan, healed, distillation.started, distilled, checkpoint)

    def prepared(self, request: HealRequest) -> Task:
        """Check the request, and make what it is trained and judged on.

        Raises:
            HealError, PlanError, CalibrationError, DivergenceError: with one sentence for the user.
        """
        check_dtype(self._base)
        kind = self._kind(request)
        self._check_depths(request, kind)
        plan = self._plan.with_drop(request.drop)
        self._make_folder()
        sources = make_corpus(self._base, request.corpus, self._folder, self._progress)
        twin = Twin(self._base, plan.dropped_layers())
        return Task(request, kind, plan, sources, twin, HeldOut(self._base, twin, sources))

    def _kind(self, request: HealRequest) -> SubstituteKind:
        """Return the kind of the healed plan's substitutes."""
        if self._plan.target != ATTENTION:
            raise HealError(
                f"substitutes stand in for attention, but plan {self._plan.id} is for target "
                f"{self._plan.target!r}; heal a plan made with --target {ATTENTION}"
            )
        if not 1 <= request.drop <= len(self._plan.ranking):
            raise HealError(
                f"cannot heal {request.drop} dropped layers: plan {self._plan.id} ranks "
                f"{len(self._plan.ranking)}; give --drop 1 to {len(self._plan.ranking)}"
            )
        if request.fit_tokens < 1:
            raise HealError(f"--fit-tokens must be at least 1, not {request.fit_tokens}")
        record = self._plan.substitutes
        own = None if record is None else parse_substitutes(record.kind)
        if own is not None and request.kind not in (None, own) and not request.refit:
            raise HealError(
                f"plan {self._plan.id} has substitutes of kind {own}; give --refit to fit "
                f"{request.kind} instead"
            )
        return request.kind or own or _FULL_RANK

    def _check_depths(self, request: HealRequest, kind: SubstituteKind) -> None:
        """Refuse to measure where layers will have no substitutes."""
        deepest = max(request.depths, default=0)
        having = self._plan.dropped_layers(request.drop) | self._beyond(kind).keys()
        if missing := sorted(self._plan.dropped_layers(deepest) - having):
            raise HealError(
                f"--measure {deepest} drops layers {missing}, which will have no substitutes; "
                f"measure at most --drop {request.drop}"
            )

    def trainees(self, task: Task) -> dict[int, Trainee]:
        """Return the substitutes, ready to be trained, as training begins with them.

        Raises:
            HealError, SubstituteError: with one sentence for the user.
        """
        start = self._start(task)
        width = int(self._base.model.config.get_text_config().hidden_size)
        rows = _some(task.training, _TOKENS_A_DIMENSION * width)
        inputs = input_statistics(self._base, rows, start, self._progress)
        return {layer: Trainee(each, inputs[layer]) for layer, each in start.items()}

    def _distillation(self, task: Task, checkpoint: Checkpoint) -> Distillation:
        training = task.request.training
        compiled = self._base.device.type == "cuda"
        return Distillation(
            self._base,
            Twin(self._base, task.layers, compiled=compiled),
            self.trainees(task),
            Batches(task.training, training.batch, training.seed),
            task.held_out,
            training,
            checkpoint,
            self._progress,
        )

    def _start(self, task: Task) -> Mapping[int, LinearSubstitute]:
        """Return the substitutes to train: the plan's own, or ones fitted now or before."""
        if self._substitutes is not None and not task.request.refit:
            return self._own(task.layers)
        path = self._fit_path(task)
        if path.exists():
            try:
                found = Substitutes.read(path).by_layer
                return {layer: found[layer] for layer in task.layers}
            except (SubstituteError, KeyError) as error:
                logger.warning("fitting again, since %s is not usable: %s", path, error)
        rows = _some(task.training, task.request.fit_tokens)
        fitted = fit_in_order(self._base, rows, task.layers, task.kind, self._progress)
        try:
            Substitutes(fitted).write(path)
        except OSError as error:
            raise HealError(f"cannot write {path}: {error.strerror}") from error
        return fitted

    def _standing(self, layers: Sequence[int]) -> Mapping[int, LinearSubstitute | None]:
        """Return what stands in these layers' places now."""
        if self._substitutes is None:
            return dict.fromkeys(layers)
        found = self._substitutes
        return {
            each: self._placed(found, each) if each in found.by_layer else None for each in layers
        }

    def _own(self, layers: Sequence[int]) -> Mapping[int, LinearSubstitute]:
        """Return the plan's own substitutes of these layers, ready to be used."""
        assert self._substitutes is not None
        if missing := sorted(set(layers) - self._substitutes.by_layer.keys()):
            raise SubstituteError(
                f"plan {self._plan.id} has no substitutes for layers {missing}; give --refit to "
                "fit new ones for all that are dropped"
            )
        return {layer: self._placed(self._substitutes, layer) for layer in layers}

    def _placed(self, substitutes: Substitutes, layer: int) -> LinearSubstitute:
        """Return one on the model's device in its dtype."""
        return substitutes.by_layer[layer].copied(self._base.device, self._base.model.dtype)

    def _all(self, healed: Mapping[int, LinearSubstitute], kind: SubstituteKind) -> Substitutes:
        """Return the healed ones, and those of layers beyond, as they were."""
        return Substitutes({**self._beyond(kind), **healed})

    def _beyond(self, kind: SubstituteKind) -> Mapping[int, LinearSubstitute]:
        """Return the plan's own substitutes, if those that are healed will be of their kind."""
        record = self._plan.substitutes
        if self._substitutes is None or record is None or record.kind != str(kind):
            return {}
        return self._substitutes.by_layer

    def _record(
        self,
        task: Task,
        substitutes: Substitutes,
        before: Mapping[str, Quality],
        distilled: Distilled,
    ) -> SubstitutesRecord:
        healed = Healed(
            drop=task.request.drop,
            steps=distilled.best_step,
            tokens=distilled.tokens,
            learning_rate=task.request.training.learning_rate,
            batch=task.request.training.batch,
            length=task.request.corpus.length,
            seed=task.request.corpus.seed,
            seconds=round(distilled.seconds, 1),
            dtype=dtype_name(self._base),
            on=tuple(
                HealedOn(
                    source=each.source,
                    fingerprint=each.fingerprint,
                    tokens=each.training.predicted,
                    held_out=task.held_out.baselines[each.name],
                    before=before[each.name],
                    after=distilled.qualities[each.name],
                )
                for each in task.sources
            ),
        )
        return SubstitutesRecord(str(task.kind), substitutes.fingerprint, healed)

    def _judged(
        self, task: Task, substitutes: Substitutes, judging: CalibrationSet | None
    ) -> tuple[Baseline | None, dict[int, Quality]]:
        """Return the full model and the depths asked about, on the plan's held-out tokens."""
        if (tokens := _untouched(judging, task.sources)) is None:
            return None, {}
        trial = Trial(self._base, tokens)
        snapshots, done = {}, 0
        for depth in sorted({task.request.drop, *task.request.depths} - {0}):
            layers = [step.layer for step in task.plan.ranking[done:depth]]
            trial.drop({layer: self._placed(substitutes, layer) for layer in layers})
            snapshots[depth], done = trial.snapshot(), depth
        found = trial.divergences(list(snapshots.values()))
        return trial.baseline, {d: each.quality for d, each in zip(snapshots, found, strict=True)}

    # What is kept, by a name that hashes everything it depends on.

    def _fit_path(self, task: Task) -> Path:
        asked = {
            "fit": str(task.kind),
            "tokens": task.request.fit_tokens,
            "layers": list(task.layers),
            **self._on(task.sources),
        }
        return self._folder / f"{digest(asked)[:16]}{SUFFIX}"

    def _checkpoint_path(self, task: Task) -> Path:
        asked = {
            "plan": self._plan.id,
            "drop": task.request.drop,
            "kind": str(task.kind),
            "refit": task.request.refit,
            "fit_tokens": task.request.fit_tokens,
            "training": asdict(task.request.training),
            **self._on(task.sources),
        }
        return self._folder / f"{digest(asked)[:16]}.checkpoint"

    def _on(self, sources: Sequence[Source]) -> dict[str, object]:
        return {
            "model": self._base.fingerprint,
            "dtype": dtype_name(self._base),
            "device": self._base.device.type,
            "sources": [each.fingerprint for each in sources],
        }

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HealError(
                f"cannot create {self._folder}: {error.strerror}; set ATTNDROP_CACHE_DIR to a "
                "writable folder"
            ) from error


def _untouched(judging: CalibrationSet | None, sources: Sequence[Source]) -> torch.Tensor | None:
    """Return the plan's held-out tokens, None where they are not known to be unseen in training."""
    if judging is None:
        logger.warning(
            "the plan's own held-out tokens are not in the cache, so the healed one will not say "
            "what its drop costs on them; `attndrop plan` on this machine puts them there"
        )
        return None
    files = {each.source for each in sources} - {SELF, SELF_CHAT}
    if shared := sorted(files.intersection(judging.sources)):
        logger.warning(
            "the plan was measured on %s, which was trained on now, so it will not say what its "
            "drop costs there",
            ", ".join(name.partition(" ")[0] for name in shared),
        )
        return None
    return judging.split()[1]


def _some(sources: Sequence[Rows], tokens: int) -> list[Rows]:
    """Return rows of each source at an even stride, `tokens` in all or a little more."""
    chosen = []
    for rows in sources:
        each = float((rows.ends).double().mean())
        count = min(len(rows), max(1, round(tokens / len(sources) / each)))
        chosen.append(rows[torch.arange(count) * len(rows) // count])
    return chosen
