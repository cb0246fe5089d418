"""Format `nemotron-nas`: a checkpoint that vLLM, SGLang and TensorRT-LLM serve without new code.

Their class for NVIDIA's Nemotron-NAS models, DeciLMForCausalLM, lets every layer say whether it has
attention and how wide its MLP is. The config class is not part of any release, so the folder
carries one (`--trust-remote-code`), and the model's code for transformers beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pruning.calibration import Progress
from pruning.export.checkpoint import TensorSource, Zeros
from pruning.export.errors import ExportError
from pruning.export.llama_like import check_first_layer, check_like_llama, head_dim, rope
from pruning.export.output import whole_folder
from pruning.export.pruned import (
    LAYERS,
    Options,
    Pruned,
    copy_remote_code,
    write_config,
    write_side_files,
)
from pruning.export.shards import write_shards

NAME = "nemotron-nas"
_MLP_MULTIPLE = 256
"""Engines round MLP sizes up to a multiple of this."""

_REMOTE_FILES = ("configuration_nemotron_nas.py", "modeling_nemotron_nas.py")
_COPIED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)


def export(pruned: Pruned, out: Path, options: Options, progress: Progress) -> None:
    """Write the folder.

    Raises:
        ExportError: the format cannot express the model, or the folder cannot be written.
    """
    check_like_llama(pruned.config, NAME)
    check_first_layer(pruned.plan.kept_layers(), NAME)
    config = _config(pruned)
    with whole_folder(out) as folder:
        write_shards(folder, list(_tensors(pruned)), options.shard_bytes, progress)
        copy_remote_code(folder, _REMOTE_FILES, {})
        write_side_files(folder, pruned)
        write_config(folder, config)


def ffn_mult(intermediate: int, hidden: int) -> float:
    """Return the multiplier from which engines compute an MLP's size, exactly.

    They take `int(2 * ffn_mult * hidden / 3)`, rounded up to a multiple of 256.

    Raises:
        ExportError: the size is no multiple of 256.
    """
    if intermediate % _MLP_MULTIPLE:
        raise ExportError(
            f"format {NAME} cannot express an MLP of size {intermediate}: engines round it up to a "
            f"multiple of {_MLP_MULTIPLE}; use --format transformers or gguf"
        )
    return 3 * intermediate / (2 * hidden)


def _config(pruned: Pruned) -> dict[str, Any]:
    given = pruned.config
    source = given.to_dict()
    parameters = rope(given)
    return {
        **{key: source[key] for key in _COPIED_KEYS},
        "architectures": ["DeciLMForCausalLM"],
        "model_type": NAME,
        "auto_map": {
            "AutoConfig": "configuration_nemotron_nas.NemotronNASConfig",
            "AutoModelForCausalLM": "modeling_nemotron_nas.DeciLMForCausalLM",
        },
        "block_configs": _blocks(pruned),
        "head_dim": head_dim(given),
        "attention_bias": _has_bias(pruned, "self_attn.q_proj"),
        "mlp_bias": _has_bias(pruned, "mlp.down_proj"),
        "dtype": source.get("dtype"),
        # Engines that do not read rope_parameters, which transformers 5 brought.
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if parameters["rope_type"] == "default" else parameters,
    }


def _blocks(pruned: Pruned) -> list[dict[str, Any]]:
    config = pruned.config
    group = config.num_attention_heads // config.num_key_value_heads
    size = ffn_mult(config.intermediate_size, config.hidden_size)
    return [
        {
            "attention": {
                "no_op": layer in pruned.dropped,
                "n_heads_in_group": None if layer in pruned.dropped else group,
                "replace_with_linear": False,
            },
            "ffn": {"ffn_mult": size, "no_op": False, "replace_with_linear": False},
        }
        for layer in range(config.num_hidden_layers)
    ]


def _tensors(pruned: Pruned) -> Iterator[TensorSource]:
    """Yield what is written: engines that read biases of Q, K and V read one of O too.

    Where the model has none (Qwen2), a bias of zeros is that.
    """
    for tensor in pruned.tensors_left():
        yield tensor
        if tensor.name.endswith("self_attn.q_proj.bias"):
            name = tensor.name.replace("q_proj", "o_proj")
            if name not in pruned.checkpoint:
                yield Zeros(name, tensor.dtype, (pruned.config.hidden_size,))


def _has_bias(pruned: Pruned, part: str) -> bool:
    return f"{LAYERS}.0.{part}.bias" in pruned.checkpoint
