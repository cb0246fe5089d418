"""Where each model family keeps the parts of a decoder layer.

One row of a table per family: adding a family means adding a row and a tiny random model of it
to the tests. This file knows transformers' attribute names; it holds no tensors and runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# RoPE variants whose frequencies depend on the longest position in a batch. Within the original
# context they are constant, so such models are served up to that length and no further.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class UnknownFamilyError(ValueError):
    """The model's architecture is not in the table."""


@dataclass(frozen=True, slots=True)
class Family:
    """The wiring of one decoder layer, as attribute names of the layer.

    Every supported layer computes, with `m` the residual multiplier (1 when None)::

        h = h + m * attention_post_norm(attention(attention_norm(h)))
        h = h + m * mlp_post_norm(mlp(mlp_norm(h)))

    where a norm that is None is the identity.
    """

    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    residual_multiplier: str | None = None


_PRE_NORM = Family()
_SANDWICH_NORM = Family(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_POST_NORM = Family(
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)

FAMILIES: Mapping[str, Family] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "phi3": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "gemma2": _SANDWICH_NORM,
    "gemma3_text": _SANDWICH_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "granite": Family(residual_multiplier="residual_multiplier"),
}


def family_of(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        UnknownFamilyError: the config's `model_type` is not in the table.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            f"model family {model_type!r} is not supported; supported families: "
            f"{', '.join(sorted(FAMILIES))}. To add one, describe its decoder layer in "
            "pruning/families.py."
        )
    return FAMILIES[model_type]


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one attention sublayer keeps for one token."""

    layers: int
    kv_heads: int
    head_dim: int

    def bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one layer keeps for one token."""
        return 2 * self.kv_heads * self.head_dim * element_bytes


def kv_shape(config: Any) -> KVShape:
    """Return the number of decoder layers and each one's key-value shape."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return KVShape(int(config.num_hidden_layers), int(kv_heads), int(head_dim))


@dataclass(frozen=True, slots=True)
class LogitForm:
    """What a family does with what its language model head computes."""

    divisor: float = 1.0
    """Logits are divided by it, as in Granite ..."""
    softcap: float | None = None
    """... and become softcap * tanh(logits / softcap), as in Gemma 2."""


def logit_form(config: Any) -> LogitForm:
    """Return what becomes of the head's products."""
    return LogitForm(
        float(getattr(config, "logits_scaling", None) or 1.0),
        getattr(config, "final_logit_softcapping", None),
    )


def context_limit(config: Any) -> int:
    """Return the longest sequence, in tokens, whose result does not depend on its neighbours.

    Length-dependent RoPE (dynamic NTK, LongRoPE) switches frequencies for a whole batch once one
    position passes the original context, so those models stop there.
    """
    limit = int(config.max_position_embeddings)
    for parameters in _rope_parameter_sets(config):
        if parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, int(original or limit))
    return limit


def _rope_parameter_sets(config: Any) -> list[Mapping[str, Any]]:
    """Return the config's RoPE settings: one set, or one per layer type (Gemma 3)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [value for value in parameters.values() if isinstance(value, Mapping)]
