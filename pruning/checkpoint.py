"""Checkpoint: training that is not finished, in one file that is written whole or not at all.

Tensors (weights now, the best ones, the optimiser's two moments) and, in the header, numbers as
JSON. The file's name says what is trained; this file knows nothing else of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pruning.divergence import Quality
from pruning.files import write_atomically

logger = logging.getLogger(__name__)

_NUMBERS = "numbers"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(ValueError):
    """A checkpoint cannot be written."""


@dataclass(slots=True)
class _Numbers:
    step: int
    tokens: int
    seconds: float
    best_step: int
    since_best: int
    latest_kl: float
    best_kl: float
    usual_gradient: float | None
    qualities: dict[str, Quality]


_NUMBERS_TYPE = TypeAdapter(_Numbers)


@dataclass(slots=True, eq=False)
class State:
    """Where training stands."""

    step: int
    """Steps that are done."""
    tokens: int
    """Predicted ones that were trained on."""
    seconds: float
    """Of training, until the last checkpoint."""
    best_step: int
    since_best: int
    """Judgements since the best one."""
    latest_kl: float
    """Mean over sources, on the held-out rows."""
    best_kl: float
    usual_gradient: Tensor | None
    """Length of the gradients of the last steps, on the device; None before the first."""
    best_qualities: Mapping[str, Quality]
    best: dict[str, Tensor]
    """The weights of the best step, by name."""

    @classmethod
    def new(cls, parts: Mapping[str, nn.Parameter]) -> State:
        """Return the state before the first step."""
        infinite = float("inf")
        return cls(0, 0, 0.0, 0, 0, infinite, infinite, None, {}, _copies(parts))

    def note(
        self, kl: float, qualities: Mapping[str, Quality], parts: Mapping[str, nn.Parameter]
    ) -> None:
        """Take a judgement of the weights as they are now."""
        self.latest_kl = kl
        self.since_best += 1
        if self.latest_kl < self.best_kl:
            self.best_kl, self.best_qualities = self.latest_kl, qualities
            self.best_step, self.since_best = self.step, 0
            self.best = _copies(parts)


class Checkpoint:
    """The file of one training."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(
        self, state: State, parts: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep everything that it takes to go on.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {f"now.{name}": part for name, part in parts.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
        for name, part in parts.items():
            for moment in _MOMENTS:
                if moment in optimizer.state[part]:
                    tensors[f"{moment}.{name}"] = optimizer.state[part][moment]
        numbers = _Numbers(
            state.step,
            state.tokens,
            state.seconds,
            state.best_step,
            state.since_best,
            state.latest_kl,
            state.best_kl,
            None if state.usual_gradient is None else float(state.usual_gradient),
            dict(state.best_qualities),
        )
        content = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {_NUMBERS: _NUMBERS_TYPE.dump_json(numbers).decode()},
        )
        try:
            write_atomically(self._path, content)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint {self._path}: {error.strerror}; set "
                "ATTNDROP_CACHE_DIR to a writable folder"
            ) from error

    def load(
        self, parts: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> State | None:
        """Put what was broken off into its parts and optimiser; None if there is nothing."""
        try:
            with safe_open(self._path, framework="pt") as file:
                numbers = _NUMBERS_TYPE.validate_json((file.metadata() or {})[_NUMBERS])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = self._restored(numbers, found, parts, optimizer)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValidationError, KeyError, RuntimeError) as error:
            logger.warning("starting over, since %s is not usable: %s", self._path, error)
            return None
        logger.info("going on after step %d, held-out KL %.4f", state.step, state.latest_kl)
        return state

    def remove(self) -> None:
        """Forget it: training is over."""
        self._path.unlink(missing_ok=True)

    def _restored(
        self,
        numbers: _Numbers,
        found: Mapping[str, Tensor],
        parts: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> State:
        best = {name: found[f"best.{name}"].to(part.device) for name, part in parts.items()}
        now = {name: found[f"now.{name}"] for name in parts}
        moments = [
            {"step": torch.tensor(float(numbers.step))}
            | {moment: found[f"{moment}.{name}"] for moment in _MOMENTS}
            for name in parts
        ]
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(now[name])
        content = optimizer.state_dict()
        content["state"] = dict(enumerate(moments))
        optimizer.load_state_dict(content)
        usual = numbers.usual_gradient
        device = next(iter(best.values())).device
        return State(
            numbers.step,
            numbers.tokens,
            numbers.seconds,
            numbers.best_step,
            numbers.since_best,
            numbers.latest_kl,
            numbers.best_kl,
            None if usual is None else torch.tensor(usual, device=device),
            numbers.qualities,
            best,
        )


def _copies(parts: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: part.detach().clone() for name, part in parts.items()}
