"""A Llama written out in plain tensor arithmetic, with attention sublayers left out or replaced.

Slow, without a cache, batch or transformers code: only the checkpoint's tensors and the formulas
of Touvron et al. (arXiv 2302.13971) with rotary embeddings (Su et al., arXiv 2104.09864) in the
half-split layout of Hugging Face checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class ReferenceLlama:
    """Greedy decoding of a Llama checkpoint folder in float32."""

    def __init__(
        self,
        folder: Path,
        dropped: Collection[int] = (),
        maps: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """maps are weights [width, width] and biases [width] in dropped layers' places."""
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: tensor.float()
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        self.dropped = frozenset(dropped)
        self.maps = maps or {}

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return [tokens, vocabulary]."""
        embedding = self.weights["model.embed_tokens.weight"]
        hidden = embedding[torch.tensor(tokens)]
        for layer in range(self.config["num_hidden_layers"]):
            if layer not in self.dropped:
                hidden = hidden + self._attention(layer, self._norm(hidden, layer, "input"))
            elif layer in self.maps:
                weight, bias = self.maps[layer]
                hidden = hidden + self._norm(hidden, layer, "input") @ weight.T + bias
            hidden = hidden + self._mlp(layer, self._norm(hidden, layer, "post_attention"))
        hidden = self._rms(hidden, self.weights["model.norm.weight"])
        return hidden @ self.weights.get("lm_head.weight", embedding).T

    def _attention(self, layer: int, hidden: Tensor) -> Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        query = self._rotate(self._project(layer, "q", hidden, heads))
        key = self._rotate(self._project(layer, "k", hidden, kv_heads))
        value = self._project(layer, "v", hidden, kv_heads)
        rows = len(hidden)
        outputs = []
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = query[:, head] @ key[:, kv_head].T / query.shape[-1] ** 0.5
            later = torch.ones(rows, rows, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, float("-inf")).softmax(-1)
            outputs.append(weights @ value[:, kv_head])
        joined = torch.cat(outputs, dim=-1)
        return joined @ self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T

    def _project(self, layer: int, which: str, hidden: Tensor, heads: int) -> Tensor:
        """Return [rows, heads, head_dim]."""
        weight = self.weights[f"model.layers.{layer}.self_attn.{which}_proj.weight"]
        return (hidden @ weight.T).view(len(hidden), heads, -1)

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        base = self.config["rope_parameters"]["rope_theta"]
        angles = torch.outer(torch.arange(len(x)).float(), base ** (-torch.arange(half) / half))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _mlp(self, layer: int, hidden: Tensor) -> Tensor:
        gate, up, down = (
            self.weights[f"model.layers.{layer}.mlp.{which}_proj.weight"]
            for which in ("gate", "up", "down")
        )
        return (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T

    def _norm(self, hidden: Tensor, layer: int, which: str) -> Tensor:
        return self._rms(hidden, self.weights[f"model.layers.{layer}.{which}_layernorm.weight"])

    def _rms(self, hidden: Tensor, weight: Tensor) -> Tensor:
        scale = (hidden.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return hidden * scale * weight
