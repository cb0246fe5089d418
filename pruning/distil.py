"""Distillation: train the substitutes of dropped sublayers to match the full model.

A step draws a batch, runs the full model without gradients and the pruned one with them, and moves
the substitutes, and whatever else of the pruned model's own is to be trained, against the gradient
of KL(full || pruned) (AdamW; the rate rises, then falls as a cosine). Every so many steps the
held-out rows are judged; the best weights seen are the result, and training ends early where it has
not got better for long.

The weights of the base model are read, never written. What is trained is in float32; on a GPU
products are computed in bfloat16. A run that was broken off goes on from its checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruning.batches import Batches
from pruning.calibration import Progress
from pruning.checkpoint import Checkpoint, State
from pruning.coordinates import Trainee
from pruning.divergence import DivergenceError, Quality
from pruning.held_out import HeldOut, mean_kl
from pruning.loading import BaseModel
from pruning.loss import DivergenceGradient
from pruning.substitutes import LinearSubstitute
from pruning.twin import Twin

_WARM_UP = 0.05
"""The share of training in which the rate rises."""
_LAST_RATE = 0.01
"""What is left of the rate at the end."""
_LONGEST_GRADIENT = 3.0
"""As a multiple of the usual one: an odd batch does not turn everything."""
_USUAL_OVER = 20
"""Steps that say what is usual."""
_BETAS = (0.9, 0.99)
_PATIENCE = 20
"""Judgements in a row without a better one that end training."""
_SAVE_AT_MOST = 0.05
"""The share of the time that writing checkpoints may take."""


class HealError(ValueError):
    """Substitutes cannot be trained as asked."""


@dataclass(frozen=True, slots=True)
class Training:
    """How substitutes are trained.

    Raises:
        HealError: a number is not usable.
    """

    steps: int | None
    """None: as many as the time allows."""
    seconds: float | None
    """None: as long as the steps take. One of both is given."""
    learning_rate: float
    batch: int
    """Rows of a step."""
    judge_every: int
    """Steps between two looks at the held-out rows."""
    seed: int

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise HealError(problem)

    def _problems(self) -> Iterator[str]:
        if (self.steps is None) == (self.seconds is None):
            yield "give either --steps or --minutes, not both"
        if self.steps is not None and self.steps < 0:
            yield f"--steps must be 0 (fit only) or more, not {self.steps}"
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            yield f"--minutes must be above 0, not {self.seconds / 60:g}"
        if not 0 < self.learning_rate <= 1:
            yield f"--learning-rate must be above 0 and at most 1, not {self.learning_rate:g}"
        if self.batch < 1:
            yield f"--batch must be at least 1, not {self.batch}"
        if self.judge_every < 1:
            yield f"--judge-every must be at least 1, not {self.judge_every}"

    def done(self, step: int, elapsed: float) -> float:
        """Return the share of training that is over, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps) if self.steps else 1.0
        assert self.seconds is not None
        return min(1.0, elapsed / self.seconds)

    def rate(self, done: float) -> float:
        """Return the learning rate when so much is over."""
        falling = 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - _WARM_UP) / (1 - _WARM_UP))
        share = _LAST_RATE + (1 - _LAST_RATE) * falling
        return self.learning_rate * share * min(1.0, (done + 1e-3) / _WARM_UP)


@dataclass(frozen=True, slots=True, eq=False)
class Distilled:
    """The best substitutes, and what it took."""

    substitutes: Mapping[int, LinearSubstitute]
    qualities: Mapping[str, Quality]
    """On the held-out rows, by source."""
    best_step: int
    steps: int
    tokens: int
    """Predicted ones that were trained on, repetitions included."""
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Additions:
    """What is trained beside the substitutes: parameters of layers that are the pruned model's own
    (`layers` of its twin)."""

    parts: Mapping[str, nn.Parameter]
    """By names that no substitute's part has."""
    learning_rate: float
    """The highest one. That of the training is for substitutes, in coordinates of their own."""


def trainable(trainees: Mapping[int, Trainee]) -> dict[str, nn.Parameter]:
    """Return what is trained of substitutes, by name."""
    return {
        f"layers.{layer}.{name}": part
        for layer, each in sorted(trainees.items())
        for name, part in each.named_parameters()
    }


class Distillation:
    """Training that can be broken off and taken up again."""

    def __init__(
        self,
        base: BaseModel,
        twin: Twin,
        trainees: Mapping[int, Trainee],
        batches: Batches,
        held_out: HeldOut,
        training: Training,
        checkpoint: Checkpoint,
        progress: Progress,
        additions: Additions | None = None,
    ) -> None:
        """There is one trainee for each dropped layer of `twin`; `held_out` judges by a twin of the
        same layers.

        Raises:
            DivergenceError: what training begins with is not finite.
        """
        base.model.requires_grad_(False)
        self._base = base
        self._twin = twin
        self._batches = batches
        self._held_out = held_out
        self._training = training
        self._checkpoint = checkpoint
        self._progress = progress
        self._gradient = DivergenceGradient(base)
        self._trainees = trainees
        self._parts = trainable(trainees)
        groups: list[dict[str, Any]] = [{"params": list(self._parts.values()), "share": 1.0}]
        if additions is not None:
            share = additions.learning_rate / training.learning_rate
            groups.append({"params": list(additions.parts.values()), "share": share})
            self._parts |= additions.parts
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=training.learning_rate,
            betas=_BETAS,
            weight_decay=0.0,  # the fit is the prior, not zero
            fused=base.device.type == "cuda",
        )
        self.parameters = sum(part.numel() for part in self._parts.values())
        """How many numbers are trained."""
        self._began = time.monotonic()
        self._saving = 0.0
        fresh = self._judged(State.new(self._parts))
        self.started = fresh.best_qualities
        """Of the substitutes that training began with, on the held-out rows, by source."""
        self._state = self._resumed() or fresh

    def run(self) -> Distilled:
        """Train until the end, and return the best.

        Raises:
            HealError: training went astray.
        """
        over = self._done() >= 1
        while not over and self._state.since_best < _PATIENCE:
            try:
                self._step()
            except torch.OutOfMemoryError as error:
                raise HealError(
                    f"{self._base.device} has too little memory for steps of "
                    f"{self._training.batch} sequences; lower --batch or --length"
                ) from error
            over = self._done() >= 1
            if over or self._state.step % self._training.judge_every == 0:
                self._judge()
        if self._state.step:
            self._save()
        return self._result()

    def _done(self) -> float:
        return self._training.done(self._state.step, self._elapsed())

    def _elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._state.seconds + time.monotonic() - self._began

    def _step(self) -> None:
        state = self._state
        batch = self._batches.at(state.step).on(self._base.device)
        with self._precision():
            full = self._twin.full(batch.token_ids)
            pruned = self._twin.pruned(full, self._trainees)
            seen = pruned.flatten(0, 1).index_select(0, batch.where)
            last = full.last.flatten(0, 1).index_select(0, batch.where)
            gradient = self._gradient(last, seen.detach(), batch.weights)
        seen.backward(gradient)  # type: ignore[no-untyped-call]
        self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = group["share"] * self._training.rate(self._done())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += len(batch.where)
        self._report()

    @torch.no_grad()
    def _clip(self) -> None:
        """Shorten a gradient that is much longer than usual. The device is not waited for."""
        gradients = [part.grad for part in self._parts.values() if part.grad is not None]
        length = nn.utils.get_total_norm(gradients).clamp(min=torch.finfo(torch.float32).tiny)
        usual = self._state.usual_gradient
        if usual is None:
            self._state.usual_gradient = length
            return
        share = (_LONGEST_GRADIENT * usual / length).clamp(max=1.0)
        torch._foreach_mul_(gradients, share)
        self._state.usual_gradient = usual + (length * share - usual) / _USUAL_OVER

    def _judge(self) -> None:
        self._state = self._judged(self._state)
        self._report()
        if self._saving <= _SAVE_AT_MOST * self._elapsed():
            self._save()

    def _judged(self, state: State) -> State:
        """Look at the held-out rows, and keep the weights if they are the best."""
        try:
            qualities = self._held_out.qualities(self._folded())
        except DivergenceError as error:
            if state.step == 0:
                raise
            raise HealError(
                f"training went astray before step {state.step}: the held-out divergence is not "
                f"finite; lower --learning-rate from {self._training.learning_rate:g}"
            ) from error
        state.note(mean_kl(qualities), qualities, self._parts)
        return state

    def _folded(self) -> dict[int, LinearSubstitute]:
        """Return the substitutes as they are now and would be served."""
        dtype = self._base.model.dtype
        return {layer: each.folded(dtype) for layer, each in self._trainees.items()}

    def _save(self) -> None:
        before = time.monotonic()
        self._state.seconds = self._elapsed()
        self._began = time.monotonic()
        self._checkpoint.save(self._state, self._parts, self._optimizer)
        self._saving += time.monotonic() - before

    def _resumed(self) -> State | None:
        found = self._checkpoint.load(self._parts, self._optimizer)
        self._began = time.monotonic()
        return found

    def _report(self) -> None:
        state, training = self._state, self._training
        what = f"healing, step {state.step}, held-out KL {state.latest_kl:.4f}"
        if training.steps is not None:
            self._progress(what, state.step, training.steps)
        elif training.seconds is not None:
            self._progress(what, int(self._elapsed()), int(training.seconds))

    def _precision(self) -> AbstractContextManager[object]:
        if self._base.device.type == "cpu":
            return nullcontext()
        return torch.autocast(self._base.device.type, torch.bfloat16)

    def _result(self) -> Distilled:
        state = self._state
        with torch.no_grad():
            for name, part in self._parts.items():
                part.copy_(state.best[name])
        return Distilled(
            substitutes=self._folded(),
            qualities=state.best_qualities,
            best_step=state.best_step,
            steps=state.step,
            tokens=state.tokens,
            seconds=self._elapsed(),
        )


def check_dtype(base: BaseModel) -> None:
    """Raise HealError unless the model's dtype can be trained through on its device."""
    dtype = base.model.dtype
    allowed = (torch.float32,) if base.device.type == "cpu" else (torch.float32, torch.bfloat16)
    if dtype not in allowed:
        names = " or ".join(str(each).removeprefix("torch.") for each in allowed)
        raise HealError(
            f"on {base.device.type} substitutes are trained with a model in {names}, not "
            f"{str(dtype).removeprefix('torch.')}; give --dtype"
        )
