"""Format `gguf`: one file for llama.cpp, Ollama and LM Studio, through their `deci` architecture.

There every layer says how many heads and key-value heads it has; 0 of both means no attention, and
no KV cache. Llama's RoPE is stored there with the two halves of a head interleaved, so Q and K are
permuted. One tensor is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray
from torch import Tensor

from pruning.calibration import Progress
from pruning.export.checkpoint import StoredTensor
from pruning.export.errors import ExportError
from pruning.export.gguf_tokenizer import add_tokenizer
from pruning.export.llama_like import check_first_layer, check_like_llama, head_dim, rope
from pruning.export.output import whole_file
from pruning.export.pruned import Options, Pruned

NAME = "gguf"

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_YARN_KEYS = {
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
}


@dataclass(frozen=True, slots=True)
class _WeightType:
    """In which types a file keeps its matrices, and what it is called."""

    matrices: Kind
    embeddings: Kind
    """Of the token embeddings and the output head, which suffer most from few bits."""
    file_type: gguf.LlamaFileType


TYPES: Mapping[str, _WeightType] = {
    "f32": _WeightType(Kind.F32, Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": _WeightType(Kind.F16, Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": _WeightType(Kind.BF16, Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": _WeightType(Kind.Q8_0, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": _WeightType(Kind.Q4_0, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_1": _WeightType(Kind.Q4_1, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q4_1),
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as the file holds it."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    source: StoredTensor | None
    """None for the RoPE factors, which are computed."""

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return tuple(quant_shape_to_byte_shape(self.shape, self.kind))


def export(pruned: Pruned, out: Path, options: Options, progress: Progress) -> None:
    """Write the file.

    Raises:
        ExportError: the format cannot express the model or its tokenizer, or the file cannot be
            written.
    """
    check_like_llama(pruned.config, NAME)
    check_first_layer(pruned.plan.kept_layers(), NAME)
    _check_rope(pruned.config)
    kind = _weight_type(options.gguf_type)
    with whole_file(out) as file:
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DECI])
        _add_facts(writer, pruned, kind)
        add_tokenizer(writer, pruned)
        _write(writer, pruned, list(_entries(pruned, kind)), progress)


def _weight_type(name: str) -> _WeightType:
    if name not in TYPES:
        raise ExportError(f"gguf type {name!r} is not one of {', '.join(TYPES)}")
    return TYPES[name]


def _check_rope(config: Any) -> None:
    parameters = rope(config)
    kind = parameters["rope_type"]
    if kind not in _ROPE_TYPES:
        raise ExportError(
            f"format {NAME} cannot express RoPE scaling {kind!r}, only {', '.join(_ROPE_TYPES)}; "
            "use --format nemotron-nas or transformers"
        )
    if kind == "yarn" and (more := sorted(parameters.keys() - _YARN_KEYS)):
        raise ExportError(
            f"format {NAME} cannot express YaRN with {', '.join(more)}; use --format nemotron-nas "
            "or transformers"
        )


def _add_facts(writer: gguf.GGUFWriter, pruned: Pruned, kind: _WeightType) -> None:
    config = pruned.config
    layers = range(config.num_hidden_layers)
    writer.add_name(f"{pruned.name}, {pruned.plan.drop} of {len(layers)} attentions dropped")
    writer.add_description(f"attndrop plan {pruned.plan.id}")
    writer.add_file_type(kind.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length([config.intermediate_size] * len(layers))
    writer.add_head_count(_where_kept(pruned, config.num_attention_heads))
    writer.add_head_count_kv(_where_kept(pruned, config.num_key_value_heads))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    _add_rope(writer, rope(config))


def _where_kept(pruned: Pruned, count: int) -> list[int]:
    layers = range(pruned.config.num_hidden_layers)
    return [0 if layer in pruned.dropped else count for layer in layers]


def _add_rope(writer: gguf.GGUFWriter, parameters: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    elif parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(parameters.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(parameters.get("beta_slow") or 1.0)


def _entries(pruned: Pruned, kind: _WeightType) -> Iterator[_Entry]:
    config = pruned.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, config.num_hidden_layers)
    for tensor in pruned.tensors_left():
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"format {NAME} has no name for the weight {tensor.name}")
        yield _Entry(name, _kind(name, tensor.shape, kind), tensor.shape, tensor)
    if rope(config)["rope_type"] == "llama3":
        yield _Entry("rope_freqs.weight", Kind.F32, (head_dim(config) // 2,), None)


def _kind(name: str, shape: tuple[int, ...], chosen: _WeightType) -> Kind:
    """Return the type of a tensor: vectors stay exact, rows that no block fits go to F16."""
    if len(shape) == 1:
        return Kind.F32
    embedding = name in ("token_embd.weight", "output.weight")
    kind = chosen.embeddings if embedding else chosen.matrices
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return Kind.F16 if shape[-1] % block else kind


def _write(
    writer: gguf.GGUFWriter, pruned: Pruned, entries: list[_Entry], progress: Progress
) -> None:
    for entry in entries:
        size = math.prod(entry.byte_shape)
        writer.add_tensor_info(
            entry.name, entry.byte_shape, np.dtype(np.uint8), size, raw_dtype=entry.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, entry in enumerate(entries, start=1):
        writer.write_tensor_data(_data(pruned, entry).view(np.uint8))
        progress("writing tensors", done, len(entries))
    writer.close()


def _data(pruned: Pruned, entry: _Entry) -> NDArray[Any]:
    if entry.source is None:
        return rope_factors(rope(pruned.config), head_dim(pruned.config))
    config, name = pruned.config, entry.source.name
    values = entry.source.load().float()
    if ".q_proj." in name:
        values = interleaved(values, config.num_attention_heads)
    elif ".k_proj." in name:
        values = interleaved(values, config.num_key_value_heads)
    quantised: NDArray[Any] = quantize(values.numpy(), entry.kind)
    return quantised


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return a Q or K weight [heads * head_dim, ...] with each head's halves interleaved.

    transformers rotates element i of a head with element i + head_dim/2, llama.cpp's `deci` 2i
    with 2i + 1.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()


def rope_factors(parameters: Mapping[str, Any], dimensions: int) -> NDArray[Any]:
    """Return what llama.cpp divides each RoPE frequency by, for Llama 3's scaling, [dimensions/2].

    Long wavelengths are stretched by `factor`, short ones stay, and those between are blended, as
    in transformers' `_compute_llama3_parameters`.
    """
    frequencies = parameters["rope_theta"] ** -(
        torch.arange(0, dimensions, 2).double() / dimensions
    )
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors = 1 / ((1 - smooth) / parameters["factor"] + smooth)
    array: NDArray[Any] = factors.float().numpy()
    return array
