"""A forward pass of few rows as one native call, up to a model's head.

    tokens, positions --> embeddings --> layers --> last norm --> head --> logits
                          '----- one call of native.cpp ----'

A model's own code around its layers, and calling each of them through Python, takes as long as
several layers. Most families do no more there than this: rows of the embedding go through all
layers with the same rotary embeddings, then through the norm into the head. Whether a model does
is seen from what it computes, and its layers are those compiled ahead of time (ahead.py), given
the same: what comes out is equal. Other models, and steps of prompts or of more rows, run by the
model's own code.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.families import LogitForm, logit_form
from pruning.sublayers import AttentionSublayer, Last, watching_layers
from server.engine.ahead import FewRows
from server.engine.attention.rows import RowsBackend
from server.engine.native import MAP_ROWS, NativeFunctions, NormedMap
from server.engine.norms import NativeNorm

_PROBED = (1, 2, 5)
"""Tokens by which a model's form is found."""
_REMEMBERED = 1024
"""Ways in which rows attend that are remembered."""

_Address = ctypes.c_void_p
_Count = ctypes.c_int64
_Float = ctypes.c_float


class _Function(ctypes.Structure):
    """As in forward.h, like the following ones."""

    _fields_ = (("container", _Address), ("run", _Address))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Function) for name in ("before", "after", "mlp")),
        *(("weights", _Address), ("weight_count", _Count), ("pages", _Address)),
        *(("group", _Count), ("window", _Count), ("scaling", _Float), ("softcap", _Float)),
        ("substitute", _Address),
    )


class _Table(ctypes.Structure):
    _fields_ = (("numbers", _Address), ("count", _Count), ("width", _Count))


class _Model(ctypes.Structure):
    _fields_ = (
        *(("layers", _Address), ("layer_count", _Count)),
        *((name, _Table) for name in ("embedding", "cosines", "sines")),
        *(("gain", _Address), ("epsilon", _Float)),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", _Count),
        *((name, _Address) for name in ("tokens", "positions", "attending", "through", "tables")),
        *(("wanted", _Address), ("wanted_count", _Count)),
    )


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """[1, rows, vocabulary]"""


@dataclass(frozen=True, slots=True)
class PlainForm:
    """What stands around the layers of a model that does nothing more there."""

    embedding: Tensor
    """[tokens, width]"""
    cosines: Tensor
    """[positions, dim]"""
    sines: Tensor
    norm: NativeNorm
    head: nn.Module


@torch.no_grad()
def plain_form(model: PreTrainedModel, context: int) -> PlainForm | None:
    """Return the form of a wrapped model in bfloat16 whose last norm is native, for positions below
    `context`; None where the model computes something else."""
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    norm, head = decoder.norm, model.get_output_embeddings()  # type: ignore[no-untyped-call]
    table: Any = model.get_input_embeddings()
    embedding = table.weight.detach()
    if not isinstance(norm, NativeNorm) or embedding.dtype != torch.bfloat16:
        return None
    if logit_form(model.config) != LogitForm():
        return None  # which small logits would not show
    seen = _Seen.of(model, context)
    entering = seen.entering[0]
    if seen.rotary_calls != 1 or not torch.equal(entering, embedding[seen.tokens]):
        return None
    tables = decoder.rotary_emb(entering, torch.arange(context)[None])
    cosines, sines = (table[0].contiguous() for table in tables)
    rotary = (cosines[seen.positions], sines[seen.positions])
    if not all(map(torch.equal, embeddings, rotary) for embeddings in seen.embeddings):
        return None
    if not torch.equal(head(norm(seen.leaving[0])), seen.logits):
        return None
    return PlainForm(embedding, cosines, sines, norm, head)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A model's forward pass of a few tokens."""

    tokens: Tensor
    positions: Tensor
    logits: Tensor
    entering: Sequence[Tensor]
    """Each layer."""
    embeddings: Sequence[tuple[Tensor, Tensor]]
    """Given to each layer."""
    leaving: Sequence[Tensor]
    """The last layer."""
    rotary_calls: int

    @classmethod
    def of(cls, model: PreTrainedModel, context: int) -> _Seen:
        decoder = model.get_decoder()  # type: ignore[no-untyped-call]
        tokens = torch.tensor([_PROBED])
        positions = torch.tensor([[0, context // 2, context - 1]])
        entering: list[Tensor] = []
        embeddings: list[tuple[Tensor, Tensor]] = []
        leaving: list[Tensor] = []
        rotary: list[object] = []

        def note(index: int, hidden: Tensor, given: tuple[Tensor, Tensor]) -> None:
            entering.append(hidden)
            embeddings.append(given)

        hooks = [
            decoder.layers[-1].register_forward_hook(lambda _, __, out: leaving.append(out)),
            decoder.rotary_emb.register_forward_hook(lambda _, __, out: rotary.append(out)),
        ]
        with watching_layers(model, note):
            logits = model(tokens, position_ids=positions).logits
        for hook in hooks:
            hook.remove()
        return cls(tokens, positions, logits, entering, embeddings, leaving, len(rotary))


class Forward:
    """A model's forward pass: of few rows by the native call, as soon as there is one."""

    def __init__(
        self,
        model: PreTrainedModel,
        sublayers: Sequence[AttentionSublayer],
        substitutes: Mapping[int, NormedMap],
        backend: RowsBackend,
        native: NativeFunctions,
        context: int,
    ) -> None:
        """substitutes are the native ones, by layer; positions are below `context`."""
        self._model, self._backend, self._native = model, backend, native
        self._substitutes = substitutes
        self._pass: NativePass | None = None
        replaced = {each.index for each in sublayers if each.substitute is not None}
        is_native = native.has_four_bits and replaced == substitutes.keys()
        self._form = plain_form(model, context) if is_native else None

    def use(self, layers: Mapping[int, FewRows]) -> None:
        """Run few rows by the native call from now on, if it can: `layers` has all layers whose
        compiled functions are complete and can be called so."""
        if self._form is not None and len(layers) == len(self._backend.group_of):
            self._pass = NativePass(
                self._form, layers, self._substitutes, self._backend, self._native
            )

    def __call__(
        self,
        tokens: Tensor,
        *,
        position_ids: Tensor,
        attending_rows: tuple[int, ...],
        mlp_rows: tuple[int, ...] | None,
        last: Last | None,
        logits_to_keep: Tensor,
        **named: Any,
    ) -> Any:
        """As the model's: tokens are [1, rows]."""
        native = self._pass
        if native is None or last is not None or not native.takes(tokens.shape[1], attending_rows):
            return self._model(
                tokens,
                position_ids=position_ids,
                attending_rows=attending_rows,
                mlp_rows=mlp_rows,
                last=last,
                logits_to_keep=logits_to_keep,
                **named,
            )
        return Output(native(tokens, position_ids, attending_rows, mlp_rows, logits_to_keep))


class NativePass:
    """The native call for a model whose layers are compiled."""

    def __init__(
        self,
        form: PlainForm,
        layers: Mapping[int, FewRows],
        substitutes: Mapping[int, NormedMap],
        backend: RowsBackend,
        native: NativeFunctions,
    ) -> None:
        self._form, self._backend, self._forward = form, backend, native.forward_rows
        dim = backend.pages[0].dim
        self._takes_chunks = all(native.attends_chunks(each.form, dim) for each in layers.values())
        self._most_rows = min(each.last for each in layers.values())
        self._replaced = tuple(substitutes)
        self._kept = (layers, substitutes)  # which hold what the following are addresses of
        self._weights = [_handles(self, layers[i].weights) for i in range(len(layers))]
        self._maps = {i: each.address() for i, each in substitutes.items()}
        self._layers = (_Layer * len(layers))(
            *(self._layer(i, layers[i]) for i in range(len(layers)))
        )
        self._model = _Model(
            *(ctypes.addressof(self._layers), len(layers)),
            *map(_table, (form.embedding, form.cosines, form.sines)),
            *(form.norm.gain.data_ptr(), form.norm.epsilon),
        )

    def takes(self, rows: int, attending: tuple[int, ...]) -> bool:
        """Whether a step that the backend is prepared for can be computed, given how many of its
        rows attend in each layer."""
        if rows > self._most_rows or (self._backend.has_chunks and not self._takes_chunks):
            return False
        return _most_replaced(rows, attending, self._replaced) <= MAP_ROWS

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        attending: tuple[int, ...],
        through: tuple[int, ...] | None,
        wanted: Tensor,
    ) -> Tensor:
        """Return logits [1, wanted rows, vocabulary].

        tokens and positions are [1, rows]; attending and through, the rows that attend and that go
        through the MLP (None: all), are given by layer; wanted is [wanted rows].

        Raises:
            RuntimeError: a token or position does not exist, or a layer failed.
        """
        rows, count = tokens.numel(), wanted.numel()
        normed = torch.empty(1, count, self._form.embedding.shape[1], dtype=torch.bfloat16)
        tables = self._backend.tables
        attending_counts = _counts(attending)
        through_counts = _counts((rows,) * len(attending) if through is None else through)
        step = _Step(
            *(rows, tokens.data_ptr(), positions.data_ptr()),
            *(ctypes.addressof(each) for each in (attending_counts, through_counts, tables)),
            *(wanted.data_ptr(), count),
        )
        if self._forward(ctypes.addressof(self._model), ctypes.addressof(step), normed.data_ptr()):
            raise RuntimeError("a token or position does not exist, or a compiled layer failed")
        return self._form.head(normed)  # type: ignore[no-any-return]

    def _layer(self, index: int, layer: FewRows) -> _Layer:
        form, weights = layer.form, self._weights[index]
        pages, substitute = self._backend.pages[index], self._maps.get(index)
        return _Layer(
            *map(_loaded, layer.libraries),
            *(ctypes.addressof(weights), len(weights), ctypes.addressof(pages)),
            *(self._backend.group_of[index], form.sliding_window or 0),
            *(form.scaling, form.softcap or 0.0),
            None if substitute is None else ctypes.addressof(substitute),
        )


def _table(rows: Tensor) -> _Table:
    return _Table(rows.data_ptr(), *rows.shape)


@lru_cache(_REMEMBERED)
def _most_replaced(rows: int, attending: tuple[int, ...], replaced: tuple[int, ...]) -> int:
    """Return how many rows gain a substitute at most in one of the layers where there is one."""
    return max((rows - attending[layer] for layer in replaced), default=0)


@lru_cache(_REMEMBERED)
def _counts(numbers: tuple[int, ...]) -> ctypes.Array[_Count]:
    return (_Count * len(numbers))(*numbers)


@cache
def _loaded(library: Path) -> _Function:
    """Return a function of a library that torch's ahead-of-time compiler made.

    Raises:
        OSError: it cannot be loaded.
    """
    loaded = ctypes.CDLL(str(library))
    container = _Address()
    create = loaded.AOTInductorModelContainerCreateWithDevice
    if create(ctypes.byref(container), ctypes.c_size_t(1), b"cpu", None):
        raise OSError(f"{library} cannot be loaded")
    run = ctypes.cast(loaded.AOTInductorModelContainerRunSingleThreaded, _Address)
    return _Function(container, run)


def _handles(owner: object, tensors: Sequence[Tensor]) -> ctypes.Array[_Address]:
    """Return what torch's C interface knows tensors by, as long as the owner lives."""
    held = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    weakref.finalize(owner, torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs, held)
    address_of = ctypes.pythonapi.PyCapsule_GetPointer
    address_of.restype, address_of.argtypes = _Address, (ctypes.py_object, ctypes.c_char_p)
    return (_Address * len(held))(*(address_of(capsule, None) for capsule in held))
