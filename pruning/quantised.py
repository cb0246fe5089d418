"""Four-bit weights in groups of 32 for the decoder layers of a model on a CPU.

A group stores one scale and one minimum for 32 inputs of an output: w = q * scale + minimum with q
from 0 to 15. Weights that lie on such a grid already, as those of a GGUF file of type Q4_0 or Q4_1
do after they were expanded, are found again without a second rounding; any other weight is rounded
to the nearest of 16 values between its group's least and greatest.

Products of few rows are bound by reading the weights, and run on four bits; for more rows a copy in
bfloat16 is faster, unless there is a function that is fast on four bits for any number. Projections
of the same input (queries, keys and values; gate and up) are one product. Activations are bfloat16.
Like projections.py, this replaces parts of a transformers model; it is shared by all variants, and
the plan does not change. Substitutes, which lie on no grid, are put into eight bits with one scale
an output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pruning.loading import BaseModel
from pruning.projections import concatenated, same_input_projections
from pruning.substitutes import LinearSubstitute

GROUP = 32
"""Inputs that share a scale and a minimum."""
_LEVELS = 15
_OUTPUTS = 16
"""torch packs outputs in multiples of this."""
FEW_ROWS = 12
"""By torch's kernel. Measured with SmolLM2-135M: 20 ms for all weights at 12 rows, 22 in bfloat16;
6 at one row."""
_FEW_HEAD_ROWS = 6
"""By torch's kernel. Measured with 49,152 outputs: 0.9 ms in eight bits at one row, 2.9 in
bfloat16; 3.8, 2.9 at 8."""
_EXACT = 1e-6


QuantisedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of inputs [rows, width], levels and scales, as [rows, outputs]."""


class QuantisationError(ValueError):
    """The weights cannot be served in four bits here."""


@dataclass(frozen=True, slots=True)
class FourBits:
    """A weight [outputs, inputs] on its grid."""

    levels: Tensor
    """[outputs, inputs] uint8, 0 to 15."""
    scales: Tensor
    """[outputs, inputs / GROUP] float32."""
    minima: Tensor
    """[outputs, inputs / GROUP] float32."""

    def expanded(self) -> Tensor:
        """Return the weight in float32."""
        levels = _grouped(self.levels).float()
        return (levels * self.scales[..., None] + self.minima[..., None]).flatten(1)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A weight as the two kernels take it."""

    four_bits: Tensor
    scales_and_zeros: Tensor
    bfloat16: Tensor | None
    """For many rows; None where four bits serve any number."""
    bias: Tensor | None


class FourBitLinear(nn.Module):
    """A linear layer on a weight in four bits."""

    def __init__(self, bits: FourBits, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = bits.levels.shape
        # torch's kernel computes (q - 8) * scale + zero.
        zeros = bits.minima + 8 * bits.scales
        # Not buffers, which a module looks up slowly: a step asks for them some hundred times.
        self._packed = _Packed(
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(bits.levels.int(), 1),
            torch.stack([bits.scales, zeros], -1).transpose(0, 1).contiguous().bfloat16(),
            bits.expanded().bfloat16(),
            None if bias is None else bias.bfloat16(),
        )
        self._product: QuantisedProduct = four_bit_product
        self._few_rows = FEW_ROWS

    def compute_by(self, product: QuantisedProduct, rows: int = 0) -> None:
        """Let another function compute products of few rows, of up to `rows` at least."""
        self._product, self._few_rows = product, max(rows, FEW_ROWS)

    def compute_all_by(self, product: QuantisedProduct) -> None:
        """Let another function compute products of any number of rows, and let go of the copy in
        bfloat16."""
        self.compute_by(product, sys.maxsize)
        self._packed = replace(self._packed, bfloat16=None)

    @property
    def step_bytes(self) -> int:
        """Bytes that a product of few rows reads."""
        return self._packed.four_bits.nbytes + self._packed.scales_and_zeros.nbytes

    @property
    def step_tensors(self) -> list[Tensor]:
        """What a product of few rows reads."""
        packed = self._packed
        bias = [] if packed.bias is None else [packed.bias]
        return [packed.four_bits, packed.scales_and_zeros, *bias]

    @contextmanager
    def lent(self, step_tensors: Sequence[Tensor]) -> Iterator[None]:
        """Compute products of few rows with other tensors, as long as this lasts."""
        own = self._packed
        four_bits, scales, *bias = step_tensors
        self._packed = replace(
            own, four_bits=four_bits, scales_and_zeros=scales, bias=bias[0] if bias else None
        )
        try:
            yield
        finally:
            self._packed = own

    def forward(self, inputs: Tensor) -> Tensor:
        packed = self._packed
        rows = inputs.reshape(-1, self.in_features)
        if rows.shape[0] > self._few_rows:
            assert packed.bfloat16 is not None
            return functional.linear(inputs, packed.bfloat16, packed.bias)
        out = self._product(rows, packed.four_bits, packed.scales_and_zeros)
        out = out.reshape(*inputs.shape[:-1], self.out_features)
        return out if packed.bias is None else out + packed.bias


class EightBitHead(nn.Module):
    """A language model head that reads one byte a weight for few rows, one scale an output."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight  # tied to the embedding in many models
        self.bias = head.bias
        self._eight_bits = _eight_bits(head.weight)
        self._product: QuantisedProduct = eight_bit_product
        self._few_rows = _FEW_HEAD_ROWS

    @property
    def step_bytes(self) -> int:
        """Bytes that a product of few rows reads."""
        return sum(tensor.nbytes for tensor in self._eight_bits)

    def compute_by(self, product: QuantisedProduct, rows: int = 0) -> None:
        """Let another function compute products of few rows, of up to `rows` at least."""
        self._product, self._few_rows = product, max(rows, _FEW_HEAD_ROWS)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not 0 < rows.shape[0] <= self._few_rows or self.bias is not None:
            return functional.linear(inputs, self.weight, self.bias)
        out = self._product(rows, *self._eight_bits)
        return out.reshape(*inputs.shape[:-1], out.shape[-1])


class EightBitSubstitute(nn.Module):
    """A linear substitute that reads one byte a weight for few rows."""

    def __init__(self, exact: LinearSubstitute) -> None:
        """exact is in bfloat16, on a CPU, of a width in multiples of GROUP; it serves many rows."""
        super().__init__()
        self.exact = exact
        self.maps = [_eight_bits(part) for part in _padded(exact)]
        """Levels [outputs, inputs] in int8 and scales [outputs] in bfloat16: one of full rank, or
        two, whose rank is padded to a multiple of GROUP."""

    def forward(self, normed: Tensor) -> Tensor:
        rows = normed.reshape(-1, normed.shape[-1])
        if not 0 < rows.shape[0] <= FEW_ROWS:
            return self.exact(normed)  # type: ignore[no-any-return]
        for levels, scales in self.maps:
            rows = eight_bit_product(rows, levels, scales)
        return (rows + self.exact.bias).reshape(normed.shape)


class _Product:
    """The product of the newest input: computed by the first part that asks, for all of them."""

    def __init__(self, linear: FourBitLinear) -> None:
        self.linear = linear
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def of(self, inputs: Tensor) -> Tensor:
        if self._output is None or self._input is not inputs:
            self._input, self._output = inputs, self.linear(inputs)
        return self._output


class SharedPart(nn.Module):
    """One of several projections of the same input: outputs `start` to `end` of their product."""

    def __init__(self, product: _Product, start: int, end: int) -> None:
        super().__init__()
        self.product, self._start, self._end = product, start, end

    def forward(self, inputs: Tensor) -> Tensor:
        return self.product.of(inputs)[..., self._start : self._end]


def four_bit_product(inputs: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """torch's kernel: inputs [rows, width] times levels packed by torch, with
    [width / GROUP, outputs, 2] scales and zeros."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        inputs, packed, GROUP, scales_and_zeros
    )
    return product


def eight_bit_product(inputs: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """torch's kernel: inputs [rows, width] times levels [outputs, width] and scales [outputs]."""
    product: Tensor = torch.ops.aten._weight_int8pack_mm(inputs, levels, scales)
    return product


def _eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return levels [outputs, inputs] in int8 and one scale an output, in bfloat16."""
    exact = weight.detach().float()
    scales = exact.abs().amax(1) / 127
    levels = (exact / torch.where(scales > 0, scales, 1.0)[:, None]).round()
    return levels.to(torch.int8), scales.bfloat16()


def quantise_substitutes(base: BaseModel) -> None:
    """Put the substitutes of a model in four bits into eight, in place."""
    for sublayer in base.sublayers:
        exact = sublayer.substitute
        if isinstance(exact, LinearSubstitute):
            sublayer.substitute = EightBitSubstitute(exact)


def _padded(substitute: LinearSubstitute) -> list[Tensor]:
    """Return a substitute's weights in the order of their products, [outputs, inputs]; zeros fill
    a rank up to the multiple of GROUP that kernels want."""
    if substitute.down is None:
        return [substitute.weight]
    missing = -len(substitute.down) % GROUP
    down = functional.pad(substitute.down, (0, 0, 0, missing))
    return [down, functional.pad(substitute.weight, (0, missing))]


def four_bits(weight: Tensor) -> FourBits:
    """Put a weight [outputs, inputs] on the grid between each group's least and greatest value."""
    groups = _grouped(weight.float())
    minima, greatest = groups.amin(-1), groups.amax(-1)
    scales = (greatest - minima) / _LEVELS
    steps = torch.where(scales > 0, scales, 1.0)
    levels = ((groups - minima[..., None]) / steps[..., None]).round().clamp(0, _LEVELS)
    return FourBits(levels.flatten(1).to(torch.uint8), scales, minima)


def is_on_grid(model: PreTrainedModel) -> bool:
    """Whether four bits hold the weights of every decoder layer as they are."""
    return all(_fits(linear) and _error(linear.weight) < _EXACT for _, _, linear in _linears(model))


def runs_here(device: torch.device) -> bool:
    """Whether this machine has the instructions that make four bits faster."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


@torch.no_grad()
def quantise(model: PreTrainedModel) -> None:
    """Put the decoder layers' weights into four bits and all others into bfloat16, in place; the
    head, for few rows, into eight.

    Raises:
        QuantisationError: the model is not on a CPU, or a weight's shape does not fit.
    """
    if model.device.type != "cpu":
        raise QuantisationError(f"int4 runs on a CPU; this model is on {model.device.type}")
    for _, name, linear in _linears(model):
        if not _fits(linear):
            raise QuantisationError(
                f"int4 needs inputs in multiples of {GROUP} and outputs in multiples of "
                f"{_OUTPUTS}; {name} has {linear.in_features} and {linear.out_features}"
            )
    for parent, parts in same_input_projections(model):
        product, start = _Product(_four_bit_linear(list(parts.values()))), 0
        for name, linear in parts.items():
            end = start + linear.out_features
            setattr(parent, name, SharedPart(product, start, end))
            start = end
    for parent, name, linear in list(_linears(model)):
        setattr(parent, name, _four_bit_linear([linear]))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear:
        model.set_output_embeddings(EightBitHead(head))  # type: ignore[no-untyped-call]


def four_bit_layers(model: nn.Module) -> list[FourBitLinear]:
    """Return the linear layers in four bits, in order; shared ones are found through their
    parts."""
    parts = (m.product.linear if isinstance(m, SharedPart) else m for m in model.modules())
    return [*dict.fromkeys(part for part in parts if isinstance(part, FourBitLinear))]


def _linears(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the linear layers of every decoder layer, with their parents and names there."""
    for layer in model.get_decoder().layers:  # type: ignore[no-untyped-call]
        for parent in layer.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    yield parent, name, child


def _four_bit_linear(linears: Sequence[nn.Linear]) -> FourBitLinear:
    """Return one layer that gives the outputs of all of them, one after the other."""
    weight, bias = concatenated(linears)
    return FourBitLinear(four_bits(weight), bias)


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % GROUP == 0 and linear.out_features % _OUTPUTS == 0


def _error(weight: Tensor) -> float:
    """Return how far four bits are from a weight, relative to its norm."""
    exact = weight.detach().float()
    return float((four_bits(exact).expanded() - exact).norm() / exact.norm())


def _grouped(weight: Tensor) -> Tensor:
    """Return [outputs, inputs] as [outputs, groups, GROUP]."""
    return weight.unflatten(1, (-1, GROUP))  # type: ignore[no-untyped-call,no-any-return]
