"""Heal: recover what dropping costs at one depth of a plan, without touching the shared weights.

First the closed form: where the plan has no substitutes, maps for all dropped layers are fitted
from the first to the last. Then distillation: they are trained together to match the full model.
The result is a plan with the same ranking, whose substitutes say how they came about, and which no
longer claims what it knew of other depths.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pruning.batches import Batches
from pruning.calibration import SELF, CalibrationSet, Progress, silent
from pruning.checkpoint import Checkpoint
from pruning.coordinates import Trainee
from pruning.corpus import CorpusRequest, Rows, Source, make_corpus
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
        check_dtype(self._base)
        kind = self._kind(request)
        plan = self._plan.with_drop(request.drop)
        self._make_folder()
        sources = make_corpus(self._base, request.corpus, self._folder, self._progress)
        twin = Twin(self._base, plan.dropped_layers())
        held_out = HeldOut(self._base, twin, sources)
        before = held_out.qualities(self._standing(twin.dropped))
        start = self._start(request, sources, twin.dropped, kind)
        trainees = self._trainees(start, sources)
        checkpoint = Checkpoint(self._checkpoint_path(request, sources, kind))
        distillation = Distillation(
            self._base,
            twin,
            trainees,
            Batches(
                [each.training for each in sources], request.training.batch, request.training.seed
            ),
            held_out,
            request.training,
            checkpoint,
            self._progress,
        )
        distilled = distillation.run()
        healed = self._all(distilled.substitutes, kind)
        record = self._record(request, kind, healed, sources, held_out, before, distilled)
        baseline, qualities = self._judged(plan, healed, request, sources, judging)
        return Healing(
            plan.healed(record, baseline, qualities),
            healed,
            distillation.started,
            distilled,
            checkpoint,
        )

    def _kind(self, request: HealRequest) -> SubstituteKind:
        """Return the kind of the healed plan's substitutes."""
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

    def _standing(self, layers: Sequence[int]) -> dict[int, LinearSubstitute | None]:
        """Return what stands in these layers' places now."""
        if self._substitutes is None:
            return dict.fromkeys(layers)
        return dict(self._attached(layers))

    def _attached(self, layers: Collection[int]) -> dict[int, LinearSubstitute]:
        """Return the plan's own substitutes of these layers, on the device in the model's dtype."""
        assert self._substitutes is not None
        if missing := sorted(set(layers) - self._substitutes.by_layer.keys()):
            raise SubstituteError(
                f"plan {self._plan.id} has no substitutes for layers {missing}; give --refit to "
                "fit new ones for all that are dropped"
            )
        return {
            layer: self._substitutes.by_layer[layer].copied(
                self._base.device, self._base.model.dtype
            )
            for layer in layers
        }

    def _start(
        self,
        request: HealRequest,
        sources: Sequence[Source],
        layers: Sequence[int],
        kind: SubstituteKind,
    ) -> Mapping[int, LinearSubstitute]:
        """Return the substitutes to train: the plan's own, or ones fitted now or before."""
        if self._substitutes is not None and not request.refit:
            return self._attached(layers)
        path = self._folder / f"{self._fit_name(request, sources, layers, kind)}{SUFFIX}"
        if path.exists():
            try:
                found = Substitutes.read(path).by_layer
                return {layer: found[layer] for layer in layers}
            except (SubstituteError, KeyError) as error:
                logger.warning("fitting again, since %s is not usable: %s", path, error)
        rows = _some([each.training for each in sources], request.fit_tokens)
        fitted = fit_in_order(self._base, rows, layers, kind, self._progress)
        try:
            Substitutes(fitted).write(path)
        except OSError as error:
            raise HealError(f"cannot write {path}: {error.strerror}") from error
        return fitted

    def _trainees(
        self, start: Mapping[int, LinearSubstitute], sources: Sequence[Source]
    ) -> dict[int, Trainee]:
        """Return what is trained: the substitutes in the coordinates of their inputs."""
        width = int(self._base.model.config.get_text_config().hidden_size)
        rows = _some([each.training for each in sources], _TOKENS_A_DIMENSION * width)
        inputs = input_statistics(self._base, rows, start, self._progress)
        return {layer: Trainee(each, inputs[layer]) for layer, each in start.items()}

    def _fit_name(
        self,
        request: HealRequest,
        sources: Sequence[Source],
        layers: Sequence[int],
        kind: SubstituteKind,
    ) -> str:
        asked = {
            "fit": str(kind),
            "tokens": request.fit_tokens,
            "layers": list(layers),
            **self._on(sources),
        }
        return digest(asked)[:16]

    def _checkpoint_path(
        self, request: HealRequest, sources: Sequence[Source], kind: SubstituteKind
    ) -> Path:
        """Return a name that hashes everything the result depends on."""
        asked = {
            "plan": self._plan.id,
            "drop": request.drop,
            "kind": str(kind),
            "refit": request.refit,
            "fit_tokens": request.fit_tokens,
            "training": asdict(request.training),
            **self._on(sources),
        }
        return self._folder / f"{digest(asked)[:16]}.checkpoint"

    def _on(self, sources: Sequence[Source]) -> dict[str, object]:
        return {
            "model": self._base.fingerprint,
            "dtype": dtype_name(self._base),
            "device": self._base.device.type,
            "sources": [each.fingerprint for each in sources],
        }

    def _all(self, healed: Mapping[int, LinearSubstitute], kind: SubstituteKind) -> Substitutes:
        """Return the healed ones, and those of layers beyond, as they were."""
        record = self._plan.substitutes
        beyond: Mapping[int, LinearSubstitute] = {}
        if self._substitutes is not None and record is not None and record.kind == str(kind):
            beyond = self._substitutes.by_layer
        return Substitutes({**beyond, **healed})

    def _record(
        self,
        request: HealRequest,
        kind: SubstituteKind,
        substitutes: Substitutes,
        sources: Sequence[Source],
        held_out: HeldOut,
        before: Mapping[str, Quality],
        distilled: Distilled,
    ) -> SubstitutesRecord:
        healed = Healed(
            drop=request.drop,
            steps=distilled.best_step,
            tokens=distilled.tokens,
            learning_rate=request.training.learning_rate,
            batch=request.training.batch,
            length=request.corpus.length,
            seed=request.corpus.seed,
            seconds=round(distilled.seconds, 1),
            dtype=dtype_name(self._base),
            on=tuple(
                HealedOn(
                    source=each.source,
                    fingerprint=each.fingerprint,
                    tokens=each.training.predicted,
                    held_out=held_out.baselines[each.name],
                    before=before[each.name],
                    after=distilled.qualities[each.name],
                )
                for each in sources
            ),
        )
        return SubstitutesRecord(str(kind), substitutes.fingerprint, healed)

    def _judged(
        self,
        plan: Plan,
        substitutes: Substitutes,
        request: HealRequest,
        sources: Sequence[Source],
        judging: CalibrationSet | None,
    ) -> tuple[Baseline | None, dict[int, Quality]]:
        """Return the full model and the depths asked about, on the plan's held-out tokens."""
        if (tokens := _untouched(judging, sources)) is None:
            return None, {}
        trial = Trial(self._base, tokens)
        snapshots, done = {}, 0
        for depth in sorted({request.drop, *request.depths} - {0}):
            plan.dropped_layers(depth)  # refuses what the ranking does not hold
            layers = [step.layer for step in plan.ranking[done:depth]]
            trial.drop({layer: self._placed(substitutes, layer) for layer in layers})
            snapshots[depth], done = trial.snapshot(), depth
        found = trial.divergences(list(snapshots.values()))
        return trial.baseline, {d: each.quality for d, each in zip(snapshots, found, strict=True)}

    def _placed(self, substitutes: Substitutes, layer: int) -> LinearSubstitute:
        if layer not in substitutes.by_layer:
            raise SubstituteError(f"there is no substitute for layer {layer} to measure with")
        return substitutes.by_layer[layer].copied(self._base.device, self._base.model.dtype)

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
    files = {each.source for each in sources} - {SELF}
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
