"""Format `transformers`: a folder for AutoModelForCausalLM, with `trust_remote_code=True`.

It carries a subclass of the base model's own class, so every family works. The model type is one
of its own: without the code, transformers refuses the folder instead of inventing weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pruning.calibration import Progress
from pruning.export.output import whole_folder
from pruning.export.pruned import (
    Options,
    Pruned,
    copy_remote_code,
    write_config,
    write_side_files,
)
from pruning.export.shards import write_shards

NAME = "transformers"
_REMOTE_FILES = ("configuration_pruned.py", "modeling_pruned.py")


def export(pruned: Pruned, out: Path, options: Options, progress: Progress) -> None:
    """Write the folder.

    Raises:
        ExportError: the folder cannot be written.
    """
    with whole_folder(out) as folder:
        write_shards(folder, list(pruned.tensors_left()), options.shard_bytes, progress)
        copy_remote_code(folder, _REMOTE_FILES, _names(pruned))
        write_side_files(folder, pruned)
        write_config(folder, _config(pruned))


def _config(pruned: Pruned) -> dict[str, Any]:
    config: dict[str, Any] = pruned.config.to_dict()
    config.update(
        model_type=_model_type(pruned),
        architectures=["PrunedForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_pruned.PrunedConfig",
            "AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM",
        },
        dropped_attention_layers=pruned.dropping_order,
    )
    return config


def _names(pruned: Pruned) -> dict[str, str]:
    """Return what the carried code is about, in place of Llama."""
    config, family = pruned.config, pruned.family
    norms = tuple(n for n in (family.attention_norm, family.attention_post_norm) if n)
    return {
        "LlamaConfig": type(config).__name__,
        "LlamaForCausalLM": pruned.checkpoint.model_class,
        "attndrop_llama": _model_type(pruned),
        'ATTENTION = "self_attn"': f'ATTENTION = "{family.attention}"',
        '("input_layernorm",)': repr(norms).replace("'", '"'),
    }


def _model_type(pruned: Pruned) -> str:
    return f"attndrop_{pruned.config.model_type}"
