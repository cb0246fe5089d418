"""The functions of native.cpp, compiled for this machine when a server first starts and kept.

A step on a CPU calls them where torch, or Python around it, takes several times as long as the
work: attention over pages, of single rows and of chunks, the last norm, the head's product in eight
bits, what stands in dropped sublayers' places, and layers' products in four bits, which layers
compiled ahead of time call by themselves. Knows addresses, shapes and strides; nothing of requests.
Without a C++ compiler, or without AVX-512, there are no such functions and everything runs as it
does without them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pruning.attention import AttentionForm
from pruning.quantised import eight_bit_product, four_bit_product, runs_here
from server.engine.operators import operator

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.cpp")
_HEADERS = _SOURCE.with_name("cpp")
_FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    *("-mprefer-vector-width=512", "-fopenmp", "-shared", "-fPIC"),
)
_PATIENCE = 120.0
"""Seconds after which a compiler has failed."""

_OUTPUTS = 4
"""Outputs of a product come in multiples of this."""
_WIDEST = 1 << 16
"""Inputs of a product whose sums fit into 32 bits."""

_Address = ctypes.c_void_p
_Count = ctypes.c_int64
_Strided = (_Address, _Count, _Count)


class _Pages(ctypes.Structure):
    """A layer's pages, as in native.cpp."""

    _fields_ = (
        ("keys", _Address),
        ("values", _Address),
        ("page_stride", _Count),
        ("tokens", _Count),
        ("kv_heads", _Count),
        ("dim", _Count),
    )


class _Map(ctypes.Structure):
    """A linear map in eight bits, as in native.cpp."""

    _fields_ = (("levels", _Address), ("scales", _Address), ("inputs", _Count), ("outputs", _Count))


class _Substitute(ctypes.Structure):
    """A substitute, its norm and its residual multiplier, as in native.cpp."""

    _fields_ = (
        ("gain", _Address),
        ("epsilon", ctypes.c_float),
        ("multiplier", ctypes.c_float),
        ("down", _Map),
        ("up", _Map),
        ("bias", _Address),
    )


def layer_pages(keys: Tensor, values: Tensor) -> ctypes.Structure:
    """Return where a layer's pages are: views [pages, tokens, kv_heads, head_dim] in bfloat16, each
    page in one piece. They must outlive what is returned."""
    _, tokens, kv_heads, dim = keys.shape
    return _Pages(keys.data_ptr(), values.data_ptr(), keys.stride(0), tokens, kv_heads, dim)


class StepTables(ctypes.Structure):
    """Addresses of a step's arrays for one layer group; who makes them keeps the arrays.

    slots are int64 [rows], page x tokens per page + place in the page; table is int32, the
    sequences' pages one after the other; table_starts and lengths, tokens with each sequence's last
    row's included, are int64 [sequences]; starts, each sequence's first row, [sequences + 1].
    """

    _fields_ = (
        ("sequences", _Count),
        *((name, _Address) for name in ("slots", "table", "table_starts", "lengths", "starts")),
    )


CHUNK_DIM = 64
"""Head dimensions that chunks are attended with come in multiples of this."""

MAP_TILE = 32
"""Inputs and outputs of a map come in multiples of this."""
MAP_ROWS = 12
"""The most rows that are mapped at once."""


@dataclass(frozen=True, slots=True)
class TiledMap:
    """A linear map in eight bits, as native.cpp reads it."""

    levels: Tensor
    """int8 [outputs / MAP_TILE, inputs, MAP_TILE]"""
    scales: Tensor
    """float32 [outputs]"""

    @classmethod
    def of(cls, levels: Tensor, scales: Tensor) -> TiledMap:
        """Levels are [outputs, inputs], both in multiples of MAP_TILE."""
        tiles = levels.unflatten(0, (-1, MAP_TILE)).transpose(1, 2)  # type: ignore[no-untyped-call]
        return cls(tiles.contiguous(), scales.float())

    def address(self) -> ctypes.Structure:
        tiles, inputs, tile = self.levels.shape
        return _Map(self.levels.data_ptr(), self.scales.data_ptr(), inputs, tiles * tile)


@dataclass(frozen=True, slots=True)
class NormedMap:
    """`hidden + multiplier * (bias + maps(norm(hidden)))`, where the norm is RMSNorm."""

    gain: Tensor | None
    """float32 [width], what a normed number is multiplied by; None: no norm."""
    epsilon: float
    multiplier: float
    maps: tuple[TiledMap, ...]
    """One, or two, the first of which is computed first."""
    bias: Tensor
    """float32 [width]"""

    def address(self) -> ctypes.Structure:
        """Return where its parts are, which must outlive what is returned."""
        *down, up = (each.address() for each in self.maps)
        return _Substitute(
            None if self.gain is None else self.gain.data_ptr(),
            self.epsilon,
            self.multiplier,
            down[0] if down else _Map(),
            up,
            self.bias.data_ptr(),
        )


def _product_shape(inputs: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], scales_and_zeros.shape[1])


@operator(_product_shape)
def four_bit_rows(inputs: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """The product of rows with a weight in four bits, which a compiler leaves as it is; a library
    that it makes calls native.cpp for it, by FOUR_BIT_ROWS."""
    return four_bit_product(inputs, packed, scales_and_zeros)


FOUR_BIT_OUTPUTS = 64
"""Outputs of such a product come in multiples of this."""
EXACT_ROWS = 3
"""Rows up to which their numbers become integers of 16 bits there; more, those of prompts and of
several requests, become integers of 8."""
_FOUR_BITS = "aoti_torch_cpu_four_bit_rows"
FOUR_BIT_ROWS = f"""AOTITorchError {_FOUR_BITS}(
    AtenTensorHandle inputs, AtenTensorHandle packed, AtenTensorHandle scales, AtenTensorHandle* out
)"""


class NativeFunctions:
    """What native.cpp computes. Threads are those that torch uses in the calling thread."""

    def __init__(self, library: Path) -> None:
        """Raises:
        OSError: the library cannot be loaded.
        """
        # Global, so that compiled layers find their products in it.
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.name = library.name
        """Says all that decides what is computed."""
        self.has_four_bits = hasattr(loaded, _FOUR_BITS)
        """Whether the processor multiplies integers."""
        self.four_bit_rows = 0
        """Rows up to which products in four bits are faster than in bfloat16."""
        if self.has_four_bits:
            self.four_bit_rows = int(_Count.in_dll(loaded, "four_bit_rows").value)
            self._four_bits = loaded.four_bit_product
            self._four_bits.restype = None
            self._four_bits.argtypes = (*(_Address,) * 4, *(_Count,) * 3)
            self.forward_rows = loaded.forward_rows
            """As in forward.h; forward.py knows what it is given."""
            self.forward_rows.argtypes = (_Address,) * 3
        self._attend = loaded.attend_rows
        self._attend.restype = None
        self._attend.argtypes = (
            *(*_Strided, *_Strided, *_Strided, _Address),
            *(_Count, ctypes.c_float, ctypes.c_float, _Count),
            *(ctypes.POINTER(_Pages), _Count, _Address, _Address, _Address, _Address),
        )
        self._attend_chunks = loaded.attend_chunks
        self._attend_chunks.restype = None
        self._attend_chunks.argtypes = (
            *(*_Strided, *_Strided, *_Strided, _Address),
            *(_Count, ctypes.c_float, _Count),
            *(ctypes.POINTER(_Pages), _Count, *(_Address,) * 5),
        )
        self.eight_bit_rows = int(_Count.in_dll(loaded, "eight_bit_rows").value)
        """Rows up to which products in eight bits are fast."""
        self._product = loaded.eight_bit_product
        self._product.restype = None
        self._product.argtypes = (*(_Address,) * 4, *(_Count,) * 3)
        self._norm = loaded.norm_rows
        self._norm.restype = None
        self._norm.argtypes = (*(_Address,) * 3, *(_Count,) * 2, ctypes.c_float)
        self._substitute = loaded.substitute_rows
        self._substitute.restype = None
        self._substitute.argtypes = (_Address, _Address, _Count, ctypes.POINTER(_Substitute))

    def __deepcopy__(self, memo: object) -> NativeFunctions:
        """Return these themselves: copies of what calls them call the same."""
        return self

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm,
        pages: ctypes.Structure,
        tables: StepTables,
    ) -> Tensor:
        """Write key and value [1, kv_heads, rows, head_dim] into their slots and attend with query
        [1, heads, rows, head_dim], one row of each sequence, all in bfloat16; return
        [1, rows, heads, head_dim]. By `attend_chunks` where that takes such heads: it is faster."""
        if self.attends_chunks(form, query.shape[-1]):
            return self.attend_chunks(query, key, value, form, pages, tables)
        scores = (form.scaling, form.softcap or 0.0, form.sliding_window or 0)
        return _attended(self._attend, query, key, value, *scores, pages, *_sequences(tables))

    def attends_chunks(self, form: AttentionForm, dim: int) -> bool:
        """Whether `attend_chunks` takes heads of this form and dimension."""
        return dim % CHUNK_DIM == 0 and form.softcap is None

    def attend_chunks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm,
        pages: ctypes.Structure,
        tables: StepTables,
    ) -> Tensor:
        """As `attend`, where a sequence may have several rows, each of which sees the tokens up to
        its own, and `attends_chunks` says so."""
        scores = (form.scaling, form.sliding_window or 0)
        where = (*_sequences(tables), tables.starts)
        return _attended(self._attend_chunks, query, key, value, *scores, pages, *where)

    def eight_bit_product(self, inputs: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
        """Return inputs [rows, width] times levels [outputs, width] and scales [outputs], all but
        the levels in bfloat16, as [rows, outputs]; by torch's kernel where this one is no faster.
        Like that one, it needs widths in multiples of 16."""
        (rows, width), outputs = inputs.shape, len(levels)
        if rows > self.eight_bit_rows or outputs % _OUTPUTS or width >= _WIDEST:
            return eight_bit_product(inputs, levels, scales)
        inputs = inputs.contiguous()
        out = inputs.new_empty(rows, outputs)
        self._product(
            *(tensor.data_ptr() for tensor in (inputs, levels, scales, out)),
            *(rows, outputs, width),
        )
        return out

    def four_bit_product(self, inputs: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
        """As `pruning.quantised.four_bit_product`, where the processor has such products and
        outputs come in multiples of FOUR_BIT_OUTPUTS; more than EXACT_ROWS rows less exactly."""
        inputs = inputs.contiguous()
        (rows, width), outputs = inputs.shape, scales_and_zeros.shape[1]
        out = inputs.new_empty(rows, outputs)
        self._four_bits(
            *(tensor.data_ptr() for tensor in (inputs, packed, scales_and_zeros, out)),
            *(rows, outputs, width),
        )
        return out

    def norm(self, hidden: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        """Return gain * x / sqrt(mean(x^2) + epsilon) of rows x, hidden [..., width] in bfloat16;
        gain is [width] in float32. Rounded once, at the end."""
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        width = hidden.shape[-1]
        addresses = (hidden.data_ptr(), gain.data_ptr(), out.data_ptr())
        self._norm(*addresses, hidden.numel() // width, width, epsilon)
        return out

    def substitute(self, hidden: Tensor, substitute: ctypes.Structure) -> Tensor:
        """Return what a substitute, given by the address of a NormedMap, makes of the residual
        stream [1, rows, width] in bfloat16, for 1 to MAP_ROWS rows."""
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        self._substitute(hidden.data_ptr(), out.data_ptr(), hidden.shape[1], substitute)
        return out


def _attended(
    function: Callable[..., None], query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> Tensor:
    """Return what a function leaves of query, key and value, given the rest."""
    _, heads, rows, dim = query.shape
    out = query.new_empty(1, rows, heads, dim)
    given = (*_strided(query), *_strided(key), *_strided(value))
    function(*given, out.data_ptr(), heads, *rest)
    return out


def _sequences(tables: StepTables) -> tuple[int, ...]:
    return (
        tables.sequences,
        tables.slots,
        tables.table,
        tables.table_starts,
        tables.lengths,
    )


def _strided(rows: Tensor) -> tuple[int, int, int]:
    """Return the address of [1, heads, rows, head_dim] and the strides of its rows and heads."""
    _, heads, count, dim = rows.stride()
    assert dim == 1, "a head's numbers lie side by side"
    return rows.data_ptr(), count, heads


def native_functions(folder: Path) -> NativeFunctions | None:
    """Return the functions, compiled into `folder` if they are not there yet; None where they do
    not run or cannot be compiled."""
    if not runs_here(torch.device("cpu")):
        return None
    flags = [*_FLAGS, *_optional_flags()]
    sources = [_SOURCE, *sorted(_HEADERS.glob("*.h"))]
    made_of = ([source.read_text() for source in sources], flags, torch.__version__)
    path = folder / f"native-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.so"
    try:
        if not path.exists():
            _compile(path, flags)
        return NativeFunctions(path)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("decoding runs without native functions, slower: %s", error)
        return None


def _optional_flags() -> list[str]:
    """Return those for instructions that not every processor with AVX-512 has."""
    flags = {
        "-mavx512bf16": torch.cpu._is_avx512_bf16_supported(),
        "-mavx512vnni": torch.cpu._is_vnni_supported(),
        "-DAMX": torch.cpu._is_amx_tile_supported(),
    }
    return [flag for flag, is_there in flags.items() if is_there]


def _compile(path: Path, flags: Sequence[str]) -> None:
    """Compile native.cpp and write it atomically.

    Raises:
        OSError, SubprocessError: there is no C++ compiler, or it failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = str(Path(folder) / path.name)
        command = [os.environ.get("CXX", "g++"), *flags, str(_SOURCE), *_libraries(), "-o", made]
        # The compiler is the choice of whoever runs the server.
        subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE)  # noqa: S603
        os.replace(made, path)


def _libraries() -> list[str]:
    """Return torch and its own OpenMP library, whose threads are there and wait for work."""
    folder = Path(torch.__file__).parent / "lib"
    found = [*folder.glob("libtorch_cpu.so"), *folder.glob("libgomp*")]
    return ["-Wl,--as-needed", *map(str, found)]
