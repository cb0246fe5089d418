"""Writing tensors into safetensors files in a stream.

The header of a safetensors file says where every tensor lies and only needs names, types and
shapes, so it is written first and the data follows piece by piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pruning.calibration import Progress
from pruning.export.checkpoint import INDEX_FILE, SINGLE_FILE, TensorSource

_ALIGNMENT = 8
_MIB = 1 << 20


def write_shards(
    folder: Path, tensors: Sequence[TensorSource], shard_bytes: int, progress: Progress
) -> None:
    """Write tensors, in order, into files of at most `shard_bytes`, with an index if several.

    A tensor that is larger gets a file of its own. Progress is told in MiB.
    """
    shards = list(_split(tensors, shard_bytes))
    names = _file_names(len(shards))
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                for piece in tensor.pieces():
                    file.write(piece)
                    done += len(piece)
                    progress("writing weights (MiB)", done // _MIB, max(1, total // _MIB))
    if len(shards) > 1:
        places = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Sequence[TensorSource], shard_bytes: int) -> Iterator[list[TensorSource]]:
    shard: list[TensorSource] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _header(shard: Sequence[TensorSource]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
