"""Which models the formats of other engines can express: layers computed as Llama's.

Both the Nemotron-NAS and the GGUF `deci` architecture know RMS norms before each sublayer, RoPE
over whole heads, grouped queries, a gated SiLU MLP and biases; nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pruning.export.errors import ExportError

_LIKE_LLAMA = frozenset({"llama", "mistral", "qwen2"})
_REASONS = {
    "qwen3": "QK-norm",
    "phi3": "query, key and value in one tensor, and partial RoPE",
    "smollm3": "layers without RoPE",
    "gemma2": "sandwich norms, soft-capped logits and sliding windows",
    "gemma3_text": "sandwich norms, QK-norm and sliding windows",
    "olmo2": "norms after the sublayers, and QK-norm",
    "olmo3": "norms after the sublayers, QK-norm and sliding windows",
    "granite": "multipliers of residuals, embeddings, attention and logits",
}


def check_like_llama(config: Any, format_name: str) -> None:
    """Raise ExportError, naming what stands in the way, unless the model computes as Llama does."""
    for problem in _problems(config):
        raise ExportError(
            f"format {format_name} cannot express a {config.model_type} model with {problem}; use "
            "--format transformers, which keeps the model's own code"
        )


def check_first_layer(kept: frozenset[int], format_name: str) -> None:
    """Raise ExportError unless layer 0 attends, which engines take for granted."""
    if 0 not in kept:
        raise ExportError(
            f"format {format_name} needs the attention of layer 0, which the plan drops"
        )


def rope(config: Any) -> dict[str, Any]:
    """Return the RoPE settings as transformers 5 keeps them, with `rope_type` and `rope_theta`."""
    return dict(config.rope_parameters)


def head_dim(config: Any) -> int:
    """Return the elements of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _problems(config: Any) -> Iterator[str]:
    if config.model_type not in _LIKE_LLAMA:
        yield _REASONS.get(config.model_type, "another form of layers")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None) is not None:
        yield f"sliding windows (sliding_window is {config.sliding_window})"
    if config.hidden_act != "silu":
        yield f"the activation {config.hidden_act!r} (only silu is known)"
    if rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial RoPE ({rope(config)['partial_rotary_factor']} of each head)"
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"{config.num_attention_heads} heads that {config.num_key_value_heads} key-value heads "
            "do not divide"
        )
