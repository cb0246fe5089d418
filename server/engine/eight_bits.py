"""Weights in eight bits on a CUDA device: the projections of every decoder layer, and the head.

A weight is put once, at load, into integers from -127 to 127 (`int8`) or numbers of four bits of
exponent and three of mantissa (`float8`, e4m3), with one float32 scale an output, so that the
largest weight of the output is the largest number there is. No copy in more bits is kept. Products
are those of linear.py, whose kernel reads the bytes, inside the graph of a step and outside.

Projections of the same input are merged on the way, as projections.py does for other weights: each
is a part of one product under a compiler, and multiplies by its own part of the bytes without one::

    whole   [ q . . . . . . . | k . | v . ]   numbers [outputs, inputs], scales [outputs]

The head is among them, since in 16 bits it would be 1.05 of the 8.03 GB of weights that a step of
Llama-3-8B reads. One tied to the embedding gets bytes of its own, vocabulary x width of them, half
of what the embedding takes: a step reads all of the head and a few rows of the embedding.
Embeddings, norms and biases stay as they are.

Here and not beside four bits in pruning, since the modules call the engine's operators.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.projections import concatenated, same_input_projections
from pruning.quantised import QuantisationError
from server.engine import linear
from server.engine.packing import BLOCK, in_order, interleave

logger = logging.getLogger(__name__)

Kind = Literal["int8", "float8"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_DTYPES: dict[Kind, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, torch.iinfo(torch.int8).max),
    "float8": (torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
}
"""And the largest number."""
_LEAST = (8, 0)
"""Compute capability that the kernels need, for bfloat16."""


class EightBits(NamedTuple):
    """A weight [outputs, inputs]."""

    numbers: Tensor
    """[outputs, inputs] in one byte each, interleaved as packing.py says."""
    scales: Tensor
    """[outputs] float32."""

    def expanded(self) -> Tensor:
        """Return the weight in float32, in order."""
        return in_order(self.numbers).float() * self.scales[:, None]

    def part(self, start: int, end: int) -> EightBits:
        """Return outputs `start` to `end`, in the same memory."""
        return EightBits(self.numbers[start:end], self.scales[start:end])


class EightBitLinear(nn.Module):
    """A linear layer on a weight in eight bits."""

    numbers: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, bits: EightBits, bias: Tensor | None) -> None:
        """bias is [outputs] or None."""
        super().__init__()
        self.register_buffer("numbers", bits.numbers, persistent=False)
        self.register_buffer("scales", bits.scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @property
    def step_bytes(self) -> int:
        """Bytes that a product reads of it."""
        tensors = (self.numbers, self.scales, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        product = linear.linear(rows, self.numbers, self.bias, self.scales)
        return product.view(*inputs.shape[:-1], product.shape[-1])


class EightBitPart(nn.Module):
    """One of several projections of the same input: outputs `start` to `end` of their product."""

    def __init__(self, whole: EightBitLinear, start: int, end: int) -> None:
        super().__init__()
        bits = EightBits(whole.numbers, whole.scales).part(start, end)
        bias = None if whole.bias is None else whole.bias[start:end]
        self.whole, self.own = whole, EightBitLinear(bits, bias)
        self._start, self._end = start, end

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.whole(inputs)[..., self._start : self._end]  # type: ignore[no-any-return]
        return self.own(inputs)  # type: ignore[no-any-return]


def eight_bits(weight: Tensor, kind: Kind) -> EightBits:
    """Put a weight [outputs, inputs] into eight bits; inputs are a multiple of 32."""
    dtype, largest = _DTYPES[kind]
    numbers = weight.detach().to(torch.float32, copy=True)
    scales = torch.maximum(numbers.amax(1), -numbers.amin(1)) / largest
    scales = torch.where(scales > 0, scales, 1.0)
    numbers.div_(scales[:, None]).clamp_(-largest, largest)
    rounded = (numbers.round_() if kind == "int8" else numbers).to(dtype)
    return EightBits(interleave(rounded), scales)


@torch.no_grad()
def quantise(model: PreTrainedModel, kind: Kind) -> None:
    """Put the weights of a model's decoder layers and head into eight bits, in place.

    A layer at a time, so that at most one exists twice. Weights whose inputs are no multiple of 32
    stay as they are.

    Raises:
        QuantisationError: the kernels do not run on the device.
    """
    _check_device(model.device, kind)
    left = 0
    for parent, parts in same_input_projections(model):
        if all(map(_fits, parts.values())):
            whole, start = _quantised(list(parts.values()), kind), 0
            for name, part in parts.items():
                setattr(parent, name, EightBitPart(whole, start, start + part.out_features))
                start += part.out_features
    for parent, name, part in _linears(model):
        if _fits(part):
            setattr(parent, name, _quantised([part], kind))
        else:
            left += 1
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear and _fits(head):
        model.set_output_embeddings(_quantised([head], kind))  # type: ignore[no-untyped-call]
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what became free is the page pool's
    if left:
        logger.warning(
            "%d weights stay as they are: their inputs are no multiple of %d", left, BLOCK
        )


def eight_bit_layers(model: nn.Module) -> list[EightBitLinear]:
    """Return the layers in eight bits, the head included, merged ones once."""
    parts = {m.own for m in model.modules() if isinstance(m, EightBitPart)}
    return [m for m in model.modules() if isinstance(m, EightBitLinear) and m not in parts]


def _check_device(device: torch.device, kind: Kind) -> None:
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _LEAST:
        raise QuantisationError(
            f"{kind} needs compute capability 8.0 (Ampere or newer); this device has "
            f"{found[0]}.{found[1]}; serve without --quantization"
        )


def _linears(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the plain linear layers of every decoder layer, with their parents and names there.

    They may be replaced while this goes on.
    """
    for layer in model.get_decoder().layers:  # type: ignore[no-untyped-call]
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    yield parent, name, child


def _quantised(linears: Sequence[nn.Linear], kind: Kind) -> EightBitLinear:
    """Return one layer that gives the outputs of all of them, one after the other."""
    weight, bias = concatenated(linears)
    return EightBitLinear(eight_bits(weight, kind), bias)


def _fits(part: nn.Linear) -> bool:
    return part.in_features % BLOCK == 0
