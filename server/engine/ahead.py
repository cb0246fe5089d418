"""Decoder layers on a CPU, compiled ahead of time into functions that hold no Python.

A step of few rows computes so little that what torch does around its operations takes longer. A
layer is cut where attention is computed, which stays as it is::

    before   hidden, cos, sin             -> query, key, value
    after    hidden, cos, sin, attended   -> hidden    output projection and residual sum
    mlp      hidden                       -> hidden

Each function is the family's own code, traced: `before` ends where that code asks for attention,
`after` is given the answer, and what does not matter for a result is left out by the compiler.
Weights are inputs: one function serves all layers of a form, and no weight exists twice. Steps of
few rows and those with prompts have functions of their own (`row_ranges`): many rows are worth a
second thread in every loop, few of no great width are not. More rows than products run on four
bits for run the family's code itself.

Functions are kept on disk for the next start. The first start compiles them on a thread while it
serves, which needs a C++ compiler; without one, layers stay as they are.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from pruning import quantised, sublayers
from pruning.attention import Attend, AttentionForm
from pruning.quantised import FEW_ROWS, FourBitLinear, four_bit_layers, runs_here
from pruning.sublayers import WrappedLayer, watching_layers
from server.engine.native import (
    FOUR_BIT_OUTPUTS,
    FOUR_BIT_ROWS,
    NativeFunctions,
    four_bit_rows,
    native_functions,
)

logger = logging.getLogger(__name__)

# torch warns of a name that its own export uses; who starts a server can do nothing about it.
warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)

COMPILER = "compile"
"""The name of the thread that compiles in the background."""

FEW = 32
"""Rows up to which a second thread in every loop is not worth it."""
MANY = 1 << 16
"""More rows than a step has."""
_SERIAL = 1 << 17
"""Numbers of a loop, in the longest step of a range, up to which a second thread costs more."""
_EXAMPLE_ROWS = 3
_MANY_TIMES = 128
"""How often those are repeated where many rows are an example."""
_LIBRARY = ".so"
_CPU = torch.device("cpu")
_PLACES = frozenset({"index", "layer_idx", "substitute", "_few_rows"})
"""Attributes that say which layer it is, what else stands in its place, or by which function it
computes, not what."""
_SUBSTITUTE = "attention.substitute"
"""Where a layer keeps what none of its functions computes."""

Embeddings = tuple[Tensor, Tensor]
Function = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class FewRows:
    """What computes a layer's steps of few rows, for callers that are no Python."""

    libraries: tuple[Path, ...]
    """Of the functions `before`, `after` and `mlp`, which call nothing that torch would have to
    find for them."""
    weights: list[Tensor]
    """What each of them is given after its inputs."""
    form: AttentionForm
    last: int
    """The most rows."""


WhenComplete = Callable[[Mapping[int, FewRows]], None]


class CompiledLayers:
    """The compiled functions of a wrapped model whose layers are in four bits."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        """Let every layer run by what `folder` has for it; the rest is `missing`."""
        self.native = native_functions(folder)
        self._few_rows: dict[int, FewRows] = {}
        self._folder = folder
        self._threads = torch.get_num_threads()
        self._missing: dict[str, _Missing] = {}
        forms: dict[str, list[_Example]] = {}
        machine = _machine(self.native)
        for example in _examples(model):
            forms.setdefault(_form(example.layer, machine), []).append(example)
        for form, examples in forms.items():
            ranges = row_ranges(examples[0].layer, self.native)
            missing = [rows for rows in ranges if not _is_complete(folder / form / rows.name)]
            if missing:
                self._missing[form] = _Missing.of(examples, missing, self.native)
            for rows in reversed(ranges):  # the last one is asked first
                if rows not in missing:
                    self._install(form, examples, rows)
        _compute_any_rows(model, self.native)

    @property
    def missing(self) -> int:
        """Forms of layers that run uncompiled."""
        return len(self._missing)

    def complete(self, then: WhenComplete = lambda _: None) -> None:
        """Call `then` as soon as nothing is missing, with what computes few rows, by layer: where
        native functions compute all of a layer's products."""
        if self._missing:
            self.compile_in_background(then)
        else:
            then(self._few_rows)

    def compile_in_background(self, then: WhenComplete = lambda _: None) -> threading.Thread:
        """Compile what is missing on a thread of low priority; layers change over when it is done.
        Then call `then` there, as `complete` does.

        Without a working C++ compiler they stay as they are, and the log says so.
        """
        logger.info(
            "compiling layers in the background, which speeds up decoding and is kept in %s",
            self._folder,
        )
        # No daemon: the interpreter must not end while compiled code is being made.
        thread = threading.Thread(target=self._compile_quietly, args=(then,), name=COMPILER)
        thread.start()
        return thread

    @torch.no_grad()
    def compile_missing(self) -> None:
        """Compile what is missing, keep it and let the layers run by it.

        Raises:
            RuntimeError, OSError, SubprocessError: there is no C++ compiler, or it failed.
        """
        started = time.monotonic()
        for form, missing in list(self._missing.items()):
            for rows in missing.ranges:
                if not _compile_form(missing, rows, self._folder / form, self._threads):
                    return
                self._install(form, missing.examples, rows)
            del self._missing[form]
        logger.info("compiled layers after %.0f s", time.monotonic() - started)

    def _compile_quietly(self, then: WhenComplete) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            self.compile_missing()
            if not self._missing:
                then(self._few_rows)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("layers run uncompiled, which is slower: %s", reason)

    def _install(self, form: str, examples: Sequence[_Example], rows: RowRange) -> None:
        paths = _paths(self._folder / form / rows.name)
        functions = _Functions(*map(_load, paths))
        for example in examples:
            layer = example.layer
            weights = _Weights(layer).tensors()
            attends = _reach(layer, example.hidden, example.embeddings).form
            _install(layer, functions, weights, attends, rows)
            if rows.first == 1 and _are_native(layer, self.native):
                libraries = tuple(path.with_suffix(_LIBRARY) for path in paths)
                few = FewRows(libraries, weights, attends, rows.last)
                self._few_rows[layer.attention.index] = few


@dataclass(frozen=True, slots=True)
class RowRange:
    """The rows of the steps that some functions are made for."""

    name: str
    first: int
    last: int
    repeated: int
    """How often the rows of an example are."""


@dataclass(frozen=True, slots=True)
class _Functions:
    """What the layers of one form share."""

    before: Function
    after: Function
    mlp: Function

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


def _paths(folder: Path) -> list[Path]:
    """Return where the functions of a form and a range are kept."""
    return [folder / f"{name}.pt2" for name in _Functions.names()]


def _is_complete(folder: Path) -> bool:
    return all(path.exists() for path in _paths(folder))


def _install(
    layer: WrappedLayer,
    functions: _Functions,
    weights: list[Tensor],
    form: AttentionForm,
    rows: RowRange,
) -> None:
    """Let a layer compute a range of rows by its form's functions, others as before."""
    other_attention, other_mlp = layer.computed()
    first, last = rows.first, rows.last

    def attention(hidden: Tensor, embeddings: Embeddings, attend: Attend, index: int) -> Tensor:
        if not first <= hidden.shape[1] <= last:
            return other_attention(hidden, embeddings, attend, index)
        given = [hidden, *embeddings]
        query, key, value = functions.before([*given, *weights])
        attended = attend(index, query, key, value, form)
        return functions.after([*given, attended, *weights])[0]

    def mlp(hidden: Tensor) -> Tensor:
        if not first <= hidden.shape[1] <= last:
            return other_mlp(hidden)
        return functions.mlp([hidden, *weights])[0]

    layer.compute_by(attention, mlp)


# Tracing.


@dataclass(frozen=True, slots=True)
class _Example:
    """A layer and what it was called with."""

    layer: WrappedLayer
    hidden: Tensor
    embeddings: Embeddings


@dataclass(frozen=True, slots=True)
class _Missing:
    """The layers of a form without functions, and one that is traced to make them: tracing changes
    it meanwhile, so no step runs it."""

    examples: Sequence[_Example]
    traced: _Example
    ranges: Sequence[RowRange]
    """Those without functions."""

    @classmethod
    def of(
        cls,
        examples: Sequence[_Example],
        ranges: Sequence[RowRange],
        native: NativeFunctions | None,
    ) -> _Missing:
        layer = copy.deepcopy(examples[0].layer)
        for linear in four_bit_layers(layer):
            if _is_native(linear, native):
                linear.compute_by(four_bit_rows, ranges[-1].last)
        return cls(examples, replace(examples[0], layer=layer), ranges)

    def example(self, rows: RowRange) -> _Example:
        """Return what is traced for a range."""

        def repeated(tensor: Tensor) -> Tensor:
            return torch.cat([tensor] * rows.repeated, dim=1)

        cos, sin = map(repeated, self.traced.embeddings)
        return replace(self.traced, hidden=repeated(self.traced.hidden), embeddings=(cos, sin))


def row_ranges(layer: WrappedLayer, native: NativeFunctions | None) -> tuple[RowRange, ...]:
    """Return the ranges of rows for which a layer has functions, which end where its products
    leave four bits."""
    if native is None or not _are_native(layer, native):
        return (RowRange("few", 1, FEW_ROWS, 1),)
    few = RowRange("few", 1, min(FEW, native.four_bit_rows), 1)
    if native.four_bit_rows == few.last:
        return (few,)
    return few, RowRange("many", few.last + 1, min(MANY, native.four_bit_rows), _MANY_TIMES)


def _are_native(layer: WrappedLayer, native: NativeFunctions | None) -> bool:
    """Whether native functions compute all of a compiled layer's products."""
    return all(_is_native(linear, native) for linear in four_bit_layers(layer))


def _is_native(linear: FourBitLinear, native: NativeFunctions | None) -> bool:
    """Whether native functions compute a product in a compiled layer."""
    has_product = native is not None and native.has_four_bits
    return has_product and linear.out_features % FOUR_BIT_OUTPUTS == 0


def _compute_any_rows(model: PreTrainedModel, native: NativeFunctions | None) -> None:
    """Let native functions compute uncompiled products as well where they are the fastest for any
    number of rows."""
    if native is None or native.four_bit_rows < MANY:
        return
    for linear in four_bit_layers(model):
        if _is_native(linear, native):
            linear.compute_all_by(native.four_bit_product)


def _examples(model: PreTrainedModel) -> list[_Example]:
    """Return every layer with what a forward pass of a few tokens gives it."""
    layers = model.get_decoder().layers  # type: ignore[no-untyped-call]
    found: list[_Example] = []

    def note(index: int, hidden: Tensor, embeddings: Embeddings) -> None:
        found.append(_Example(layers[index], hidden, embeddings))

    positions = torch.arange(_EXAMPLE_ROWS)[None]
    with watching_layers(model, note):
        model(positions, position_ids=positions)
    return found


class _Weights:
    """The tensors of a layer that a step of few rows reads, in an order that its form decides."""

    def __init__(self, layer: WrappedLayer) -> None:
        self.parameters = {
            name: parameter.detach()
            for name, parameter in layer.named_parameters()
            if not name.startswith(_SUBSTITUTE)
        }
        self._linears = four_bit_layers(layer)

    def tensors(self) -> list[Tensor]:
        packed = [tensor for linear in self._linears for tensor in linear.step_tensors]
        return [*self.parameters.values(), *packed]

    @contextmanager
    def lent(self, tensors: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        """Let the layer's products compute with others of `tensors`, which has the order of
        `tensors()`; yields those that stand for parameters, by name."""
        rest = iter(tensors)
        parameters = {name: next(rest) for name in self.parameters}
        with ExitStack() as lent:
            for linear in self._linears:
                lent.enter_context(linear.lent([next(rest) for _ in linear.step_tensors]))
            yield parameters


class _Reached(Exception):  # noqa: N818 - not an error
    """Attention is asked for."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm) -> None:
        super().__init__()
        self.query, self.key, self.value, self.form = query, key, value, form


def _reach(layer: WrappedLayer, hidden: Tensor, embeddings: Embeddings) -> _Reached:
    """Run a layer until it asks for attention."""

    def attend(
        layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        raise _Reached(query, key, value, form)

    attention, _ = layer.computed()
    try:
        attention(hidden, embeddings, attend, 0)
    except _Reached as reached:
        return reached
    raise AssertionError("the layer asked for no attention")


class _Part(nn.Module):
    """A part of a layer, of inputs alone."""

    def __init__(self, layer: WrappedLayer) -> None:
        super().__init__()
        self.layer = layer


class _Before(_Part):
    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reached = _reach(self.layer, hidden, (cos, sin))
        return reached.query, reached.key, reached.value


class _After(_Part):
    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attended: Tensor) -> Tensor:
        def attend(
            layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
        ) -> Tensor:
            return attended

        attention, _ = self.layer.computed()
        return attention(hidden, (cos, sin), attend, 0)


class _Mlp(_Part):
    def forward(self, hidden: Tensor) -> Tensor:
        _, mlp = self.layer.computed()
        return mlp(hidden)


class _Traced(nn.Module):
    """A part whose weights are inputs: forward(*inputs, *weights)."""

    def __init__(self, part: _Part, held: _Weights) -> None:
        super().__init__()
        self._part = (part,)  # not a submodule: nothing of it is to be kept
        self._held = held

    def forward(self, *tensors: Tensor) -> Any:
        inputs, weights = tensors[: -self._count], tensors[-self._count :]
        with self._held.lent(weights) as parameters:
            named = {f"layer.{name}": tensor for name, tensor in parameters.items()}
            return functional_call(self._part[0], named, inputs)

    @property
    def _count(self) -> int:
        return len(self._held.tensors())


def _compile_form(missing: _Missing, rows: RowRange, folder: Path, threads: int) -> bool:
    """Compile the functions of a form and a range that their folder lacks; return False if the
    program ends meanwhile."""
    example = missing.example(rows)
    layer, hidden, embeddings = example.layer, example.hidden, example.embeddings
    held = _Weights(layer)
    attended = _reach(layer, hidden, embeddings).query.transpose(1, 2).contiguous()
    parts: dict[str, tuple[_Part, list[Tensor]]] = {
        "before": (_Before(layer), [hidden, *embeddings]),
        "after": (_After(layer), [hidden, *embeddings, attended]),
        "mlp": (_Mlp(layer), [hidden]),
    }
    paths = _paths(folder / rows.name)
    for path, (part, inputs) in zip(paths, parts.values(), strict=True):
        if not threading.main_thread().is_alive():
            return False
        if not path.exists():
            traced = _Traced(part, held)
            own = _threads(layer, rows, threads)
            _compile(traced, inputs, held.tensors(), path, own, rows)
    return True


def _threads(layer: WrappedLayer, rows: RowRange, most: int) -> int:
    """Return how many threads loops outside of products are worth."""
    widest = max(linear.out_features for linear in four_bit_layers(layer))
    return 1 if rows.last * widest <= _SERIAL else most


def _compile(
    traced: nn.Module,
    inputs: list[Tensor],
    weights: list[Tensor],
    path: Path,
    threads: int,
    rows: RowRange,
) -> None:
    """Compile a function of any number of rows in a range, and write it atomically, after the
    library that is in it."""
    dim = torch.export.Dim("rows", min=rows.first, max=rows.last)
    shapes = [{1: dim}] * len(inputs) + [None] * len(weights)
    exported = torch.export.export(
        traced, (*inputs, *weights), dynamic_shapes=(tuple(shapes),), strict=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(Path(folder) / path.name),
            # int4 runs where the instructions are known to be there; checking them takes long.
            inductor_configs={
                "cpp.threads": threads,
                "cpp.vec_isa_ok": runs_here(_CPU) or None,
                "aot_inductor.custom_ops_to_c_shims": {
                    torch.ops.attndrop.four_bit_rows.default: [FOUR_BIT_ROWS]
                },
            },
        )
        with zipfile.ZipFile(written) as package:
            name = next(name for name in package.namelist() if name.endswith(_LIBRARY))
            os.replace(package.extract(name, folder), path.with_suffix(_LIBRARY))
        os.replace(written, path)


def _load(path: Path) -> Function:
    # What the loaded model does around `boxed_run` takes longer than the function itself.
    loaded: Function = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    return loaded


# What tells functions apart.


def _form(layer: WrappedLayer, machine: tuple[object, ...]) -> str:
    """Return a name for all that decides what a layer computes, but for its weights' values."""
    held = _Weights(layer)
    shapes = [(name, tuple(p.shape), p.dtype) for name, p in held.parameters.items()]
    packed = [(tuple(tensor.shape), tensor.dtype) for tensor in held.tensors()]
    modules = [
        (name, type(module).__qualname__, _settings(module))
        for name, module in layer.named_modules()
        if not name.startswith(_SUBSTITUTE)
    ]
    return hashlib.sha256(repr((shapes, packed, modules, machine)).encode()).hexdigest()[:24]


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """Return a module's numbers, switches and names."""
    kinds = (bool, int, float, str, type(None))
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, kinds) and name not in _PLACES
    )


def _machine(native: NativeFunctions | None) -> tuple[object, ...]:
    """Return versions, the processor and native functions, for which code is made."""
    sources = [Path(module.__file__ or "") for module in (quantised, sublayers)]
    return (
        torch.__version__,
        transformers.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        native and native.name,
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in [*sources, Path(__file__)]],
    )
