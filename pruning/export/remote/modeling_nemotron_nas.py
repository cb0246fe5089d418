"""Nemotron-NAS models of which some layers have no attention, for transformers.

A layer without attention has no input norm, no attention weights and no KV cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM

from .configuration_nemotron_nas import NemotronNASConfig


class NoAttention(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


class DeciLMForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    config_class = NemotronNASConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            if block.attention.no_op:
                layer.self_attn = NoAttention()
                layer.input_layernorm = nn.Identity()
