"""Configuration of a model of which some attention sublayers are dropped.

`dropped_attention_layers` lists their layers, in the order in which they were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import LlamaConfig as BaseConfig


class PrunedConfig(BaseConfig):  # type: ignore[no-untyped-call]
    model_type = "attndrop_llama"

    def __init__(self, dropped_attention_layers: Iterable[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dropped_attention_layers = list(dropped_attention_layers)
