"""Substitutes in closed form: linear maps that stand in dropped attention sublayers' places.

The map is the linear minimum-mean-square-error estimate of the sublayer's output from its normed
input (Neural Block Linearization, arXiv 2505.21077)::

    output ~ mean(y) + (x - mean(x)) A        A = (Cov(x) + ridge I)^-1 Cov(x, y)

from sums over calibration tokens in float64. The ridge is the one that predicts tokens best which
were not fitted on. A map of rank r is the best such map in the same measure: with
Cov(x) + ridge I = L L^T, the first r singular directions of L^T A.

A plan has one substitute for each ranked layer, fitted with all layers ranked before it dropped
and substituted already. Variants of one plan share them: a variant that drops more layers uses
those of one that drops fewer, and adds its own. Token-wise, so no keys and values are kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from pruning.files import write_atomically
from pruning.loading import BaseModel

LINEAR = "linear"
SUFFIX = ".safetensors"
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Candidates, as multiples of the mean variance of an input."""
MAX_FILE_BYTES = 16 << 30

_KIND = re.compile(rf"{LINEAR}(:(?P<rank>[1-9][0-9]{{0,5}}))?")
_NAME = re.compile(r"layers\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<part>down|weight|bias)")
_CHOOSING = 4
"""One in so many rows, the last ones of each batch, chooses the ridge."""


class SubstituteError(ValueError):
    """Substitutes cannot be fitted, read, or used with a model."""


@dataclass(frozen=True, slots=True)
class SubstituteKind:
    """What stands in the place of a dropped sublayer."""

    rank: int | None
    """Of the linear map; None is the full rank."""

    def __str__(self) -> str:
        return LINEAR if self.rank is None else f"{LINEAR}:{self.rank}"


def parse_substitutes(text: str) -> SubstituteKind | None:
    """Return what `none`, `linear` or `linear:RANK` asks for.

    Raises:
        SubstituteError: the text is something else.
    """
    if text == "none":
        return None
    if (match := _KIND.fullmatch(text)) is None:
        raise SubstituteError(
            f"substitutes must be 'none', '{LINEAR}', or '{LINEAR}:RANK' such as '{LINEAR}:64', "
            f"not {text!r:.80}"
        )
    return SubstituteKind(int(match["rank"]) if match["rank"] else None)


class LinearSubstitute(nn.Module):
    """`x weight^T + bias`; where the rank is bounded, `x down^T weight^T + bias`."""

    def __init__(self, weight: Tensor, bias: Tensor, down: Tensor | None = None) -> None:
        """weight is [width, width], or [width, rank] with down [rank, width]; bias is [width]."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.down = None if down is None else nn.Parameter(down, requires_grad=False)

    def forward(self, normed: Tensor) -> Tensor:
        if self.down is not None:
            normed = functional.linear(normed, self.down)
        return functional.linear(normed, self.weight, self.bias)

    def copied(self, device: torch.device, dtype: torch.dtype) -> LinearSubstitute:
        """Return a copy of its own, without gradients."""
        parts = {
            name: part.detach().to(device, dtype, copy=True)
            for name, part in self.named_parameters()
        }
        return LinearSubstitute(**parts)


class Moments:
    """Sums over pairs of normed inputs and outputs, in float64, from which a map is solved."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.sums = torch.zeros(2, width, dtype=torch.float64, device=device)
        self.inputs = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.squares = 0.0
        """Sum of the outputs' squares."""

    def add(self, normed: Tensor, output: Tensor) -> None:
        """Add pairs, both [rows, width]."""
        x, y = normed.double(), output.double()
        self.count += len(x)
        self.sums += torch.stack([x.sum(0), y.sum(0)])
        self.inputs += x.T @ x
        self.cross += x.T @ y
        self.squares += float(y.square().sum())

    def joined(self, other: Moments) -> Moments:
        """Return the moments of both sets of pairs."""
        both = Moments(self.sums.shape[1], self.sums.device)
        both.count = self.count + other.count
        both.sums = self.sums + other.sums
        both.inputs = self.inputs + other.inputs
        both.cross = self.cross + other.cross
        both.squares = self.squares + other.squares
        return both

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Return the covariance of the inputs, and of inputs with outputs, [width, width]."""
        x, y = self.sums / self.count
        inputs = self.inputs / self.count - torch.outer(x, x)
        return inputs, self.cross / self.count - torch.outer(x, y)

    def error(self, solution: Tensor, bias: Tensor) -> float:
        """Return the mean squared error of `x solution + bias` over these pairs."""
        x, y = self.sums
        predicted = (
            (solution * (self.inputs @ solution)).sum()
            + 2 * (x @ solution) @ bias
            + self.count * bias @ bias
        )
        common = (solution * self.cross).sum() + bias @ y
        return (self.squares + float(predicted - 2 * common)) / self.count


def fit_linear(
    pairs: Iterable[tuple[Tensor, Tensor]], kind: SubstituteKind, dtype: torch.dtype
) -> LinearSubstitute:
    """Return the substitute for pairs of normed inputs and outputs, each [rows, width].

    The pairs come in batches of samples; a quarter of each chooses the ridge, all make the map.

    Raises:
        SubstituteError: what the pairs hold is not finite.
    """
    fitted, held_out = _moments(pairs)
    solved = {ridge: _solve(fitted, ridge) for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: held_out.error(*solved[ridge]))
    whole = fitted.joined(held_out)
    solution, bias = _solve(whole, best)
    weight, down = solution.T, None
    if kind.rank is not None and kind.rank < len(solution):
        down, weight = _truncated(solution, whole, best, kind.rank)
        # The mean stays exact: the bias takes up what the directions left out added to it.
        x, y = whole.sums / whole.count
        bias = y - x @ down.T @ weight.T
    fitted_map = LinearSubstitute(weight.contiguous(), bias, down).to(dtype)
    if not all(bool(torch.isfinite(part).all()) for part in fitted_map.parameters()):
        raise SubstituteError(
            "a substitute is not finite; load the model with --dtype bfloat16 or float32"
        )
    return fitted_map


def _moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Moments, Moments]:
    """Return the moments of the rows to fit on, and of those that choose the ridge."""
    found: list[Moments] = []
    for normed, output in pairs:
        if not found:
            found = [Moments(normed.shape[-1], normed.device) for _ in range(2)]
        end = len(normed) - max(1, len(normed) // _CHOOSING)
        found[0].add(normed[:end], output[:end])
        found[1].add(normed[end:], output[end:])
    fitted, held_out = found
    return fitted, held_out


def _regularised(moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of Cov(x) + ridge I, and Cov(x, y)."""
    inputs, cross = moments.covariances()
    scale = inputs.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    identity = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    factor, failed = torch.linalg.cholesky_ex(inputs + ridge * scale * identity)
    if bool(failed):
        raise SubstituteError(
            "the inputs of a sublayer are not finite; load the model with --dtype bfloat16 or "
            "float32"
        )
    return factor, cross


def _solve(moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """Return A [width, width] and the bias [width] of `y = x A + bias`."""
    factor, cross = _regularised(moments, ridge)
    solution = torch.cholesky_solve(cross, factor)
    x, y = moments.sums / moments.count
    return solution, y - x @ solution


def _truncated(
    solution: Tensor, moments: Moments, ridge: float, rank: int
) -> tuple[Tensor, Tensor]:
    """Return down [rank, width] and weight [width, rank] of the best map of that rank."""
    factor, _ = _regularised(moments, ridge)
    left, values, right = torch.linalg.svd(factor.T @ solution, full_matrices=False)
    down = torch.linalg.solve_triangular(factor.T, left[:, :rank], upper=True)
    down, up = down * values[:rank].sqrt(), values[:rank, None].sqrt() * right[:rank]
    return down.T.contiguous(), up.T


# Many of them: one for each ranked layer.


@dataclass(frozen=True, slots=True, eq=False)
class Substitutes:
    """The substitutes of a plan, by layer."""

    by_layer: Mapping[int, LinearSubstitute]

    @property
    def fingerprint(self) -> str:
        """`sha256:...` over every tensor's name, shape, type and content."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def size(self, layers: Iterable[int]) -> tuple[int, int]:
        """Return the parameters and bytes of those in the given layers."""
        chosen = [self.by_layer[layer] for layer in layers if layer in self.by_layer]
        parameters = [parameter for each in chosen for parameter in each.parameters()]
        return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)

    def described(self, layers: Iterable[int]) -> str:
        """Return how many there are in the given layers and what they take, for a person."""
        chosen = [layer for layer in layers if layer in self.by_layer]
        parameters, size = self.size(chosen)
        return f"{len(chosen)} substitutes: {parameters:,} parameters, {size / 2**20:.1f} MiB"

    def attach(self, base: BaseModel, layers: Iterable[int]) -> None:
        """Put those of the given layers into the places of dropped sublayers, in the model's dtype
        and on its device. Rows that attend are not touched.

        Raises:
            SubstituteError: one is missing, or is for another width.
        """
        for layer in layers:
            if layer not in self.by_layer:
                raise SubstituteError(
                    f"there is no substitute for layer {layer}; drop fewer layers of this plan, or "
                    "heal it at this depth"
                )
            substitute = self.by_layer[layer]
            width = int(base.model.config.get_text_config().hidden_size)
            if substitute.bias.shape != (width,):
                raise SubstituteError(
                    f"the substitute of layer {layer} is for a width of {len(substitute.bias)}, "
                    f"but {base.name} has {width}"
                )
            base.sublayers[layer].substitute = substitute.to(base.device, base.model.dtype)

    def write(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises OSError."""
        write_atomically(path, save(self._tensors()))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a safetensors file.

        Raises:
            SubstituteError: not readable, too large, or not a file of substitutes.
        """
        try:
            if (size := path.stat().st_size) > MAX_FILE_BYTES:
                raise SubstituteError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are read")
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise SubstituteError(
                f"the plan's substitutes are not in {path}; keep that file beside the plan"
            ) from error
        except (OSError, SafetensorError) as error:
            raise SubstituteError(f"cannot read substitutes {path}: {error}") from error
        return cls(_by_layer(path, tensors))

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"layers.{layer}.{name}": part.detach().cpu().contiguous()
            for layer, each in self.by_layer.items()
            for name, part in each.named_parameters()
        }


def _by_layer(path: Path, tensors: Mapping[str, Tensor]) -> dict[int, LinearSubstitute]:
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or not tensor.is_floating_point():
            raise SubstituteError(f"{path} holds {name!r:.80}, which is no part of a substitute")
        parts.setdefault(int(match["layer"]), {})[match["part"]] = tensor
    return {layer: _from_parts(path, layer, found) for layer, found in parts.items()}


def _from_parts(path: Path, layer: int, parts: Mapping[str, Tensor]) -> LinearSubstitute:
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    width = len(parts["bias"]) if len(shapes.get("bias", ())) == 1 else 0
    expected: dict[str, tuple[int, ...]] = {"weight": (width, width), "bias": (width,)}
    if "down" in parts and parts["down"].dim() == 2:
        rank = shapes["down"][0]
        expected |= {"weight": (width, rank), "down": (rank, width)}
    if shapes != expected:
        raise SubstituteError(
            f"{path} holds tensors of shapes {shapes} for layer {layer}; a substitute is a weight "
            "[width, width] and a bias [width], or a weight [width, rank], down [rank, width] and "
            "a bias"
        )
    return LinearSubstitute(**parts)
