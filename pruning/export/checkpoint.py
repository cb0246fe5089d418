"""A checkpoint folder read without loading it: where every tensor lies, and its bytes in pieces.

Reads safetensors headers itself and the data with plain reads instead of a memory map, so that
what an export holds in memory is one piece of one tensor, whatever the size of the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pruning.export.errors import ExportError
from pruning.families import UnknownFamilyError, family_of
from pruning.loading import fingerprint_of, sampled

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PIECE_BYTES = 4 << 20
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorSource(Protocol):
    """A tensor that can be written without being held."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str:
        """As safetensors calls it: F32, F16, BF16."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def pieces(self) -> Iterator[bytes]:
        """Yield the tensor's bytes, row-major and little-endian, a few MiB at a time."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    """Bytes of the file before it."""
    nbytes: int

    def pieces(self) -> Iterator[bytes]:
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                if not piece:
                    raise ExportError(f"{self.file} ended within {self.name}; fetch it again")
                left -= len(piece)
                yield piece

    def load(self) -> Tensor:
        """Return the whole tensor."""
        flat = torch.frombuffer(bytearray(b"".join(self.pieces())), dtype=_TORCH_DTYPES[self.dtype])
        return flat.reshape(self.shape)

    def sample(self) -> Tensor:
        """Return the elements that a fingerprint looks at."""
        dtype = _TORCH_DTYPES[self.dtype]
        chosen = sampled(math.prod(self.shape))
        with self.file.open("rb", buffering=0) as file:
            raw = bytearray()
            for element in range(chosen.start, chosen.stop, chosen.step):
                file.seek(self.start + element * dtype.itemsize)
                raw += file.read(dtype.itemsize)
        return torch.frombuffer(raw, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Zeros:
    """A tensor of zeros that no file holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _TORCH_DTYPES[self.dtype].itemsize

    def pieces(self) -> Iterator[bytes]:
        yield bytes(self.nbytes)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's checkpoint on disk."""

    folder: Path
    config: PreTrainedConfig
    tensors: Mapping[str, StoredTensor]
    """By name, in the order of the files."""
    parameters: Sequence[tuple[str, tuple[int, ...]]]
    """Names and shapes of the model's weights, in the model's order."""
    model_class: str
    """Name of the model's class in transformers."""

    def fingerprint(self) -> str:
        """Return what `loading.model_fingerprint` gives for the loaded model."""
        return fingerprint_of(
            (name, shape, self.tensors[name].sample()) for name, shape in self.parameters
        )

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def read_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read what a checkpoint folder holds, without its weights' data.

    Tensors that are not weights of the model (old rotary buffers, a copy of tied embeddings) are
    left out.

    Raises:
        ExportError: not a safetensors checkpoint in plain floating point, damaged, or weights
            are missing.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        family_of(config)
    except UnknownFamilyError as error:
        raise ExportError(f"cannot export {folder}: {error}") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read the config of {folder}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError(
            f"{folder} holds quantised weights; export the model that they were made from"
        )
    found = {t.name: t for file in _files(folder) for t in _read_header(file)}
    model = _without_memory(config, trust_remote_code)
    parameters = [(name, tuple(weight.shape)) for name, weight in model.named_parameters()]
    for name, shape in parameters:
        _check(folder, name, shape, found.get(name))
    wanted = {name for name, _ in parameters}
    tensors = {name: tensor for name, tensor in found.items() if name in wanted}
    return Checkpoint(folder, config, tensors, parameters, type(model).__name__)


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ExportError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model with "
            "transformers' save_pretrained, which writes safetensors"
        )
    try:
        names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ExportError(f"{index} is damaged; fetch the checkpoint again") from error
    if bad := [name for name in names if Path(str(name)).name != name]:
        raise ExportError(f"{index} names the file {bad[0]!r}, which is not in its folder")
    return [folder / name for name in names]


def _read_header(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a safetensors file: 8 bytes of length, a JSON header, then the data."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            yield _entry(file, size, 8 + length, name, entry)
    except OSError as error:
        raise ExportError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{file} is not a safetensors file ({error}); fetch it again") from error


def _entry(file: Path, size: int, data: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(extent) for extent in entry["shape"])
    tensor = StoredTensor(name, str(entry["dtype"]), shape, file, data + begin, end - begin)
    dtype = _TORCH_DTYPES.get(tensor.dtype)
    if not 0 <= begin <= end <= size - data:
        raise ValueError(f"{name} lies outside of it")
    if dtype is not None and math.prod(shape) * dtype.itemsize != tensor.nbytes:
        raise ValueError(f"{name} has {tensor.nbytes} bytes, which does not fit its shape")
    return tensor


def _without_memory(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model with weights that have shapes and nothing else."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust_remote_code
        )
    return model


def _check(folder: Path, name: str, shape: tuple[int, ...], tensor: StoredTensor | None) -> None:
    if tensor is None:
        raise ExportError(f"{folder} lacks the weight {name}; fetch the checkpoint again")
    if tensor.shape != shape:
        raise ExportError(
            f"{name} in {folder} has shape {tensor.shape}, but its config says {shape}"
        )
    if tensor.dtype not in _TORCH_DTYPES:
        raise ExportError(
            f"{name} in {folder} is of type {tensor.dtype}; an export reads "
            f"{', '.join(_TORCH_DTYPES)}: export the model that it was made from"
        )
