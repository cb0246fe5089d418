"""A model of which some attention sublayers are dropped, with their norms, weights and KV cache.

Everything else is the base model's own code in transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM as BaseModel

from .configuration_pruned import PrunedConfig

ATTENTION = "self_attn"
ATTENTION_NORMS = ("input_layernorm",)


class NoAttention(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


class PrunedForCausalLM(BaseModel):  # type: ignore[no-untyped-call]
    config_class = PrunedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        dropped = set(config.dropped_attention_layers)
        for index in dropped:
            layer = self.model.layers[index]
            setattr(layer, ATTENTION, NoAttention())
            for norm in ATTENTION_NORMS:
                setattr(layer, norm, nn.Identity())
        _move_up_in_cache(self.model.layers, config, dropped)


def _move_up_in_cache(layers: nn.ModuleList, config: Any, dropped: set[int]) -> None:
    """Give the attending layers of each type the first cache entries of that type.

    Masks are sized by the first entry of a type, so that one must be in use.
    """
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    for kind in set(types):
        entries = iter([index for index, each in enumerate(types) if each == kind])
        for index, layer in enumerate(layers):
            if types[index] == kind and index not in dropped:
                getattr(layer, ATTENTION).layer_idx = next(entries)
