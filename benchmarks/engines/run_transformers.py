"""Runs a checkpoint in transformers. Run by `running.run_engine` with any environment's Python."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, __version__


def main(task: dict[str, Any]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        task["model"], trust_remote_code=True, dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    # The argument's name since transformers 5.20, and before.
    known = "cache" in inspect.signature(model.forward).parameters
    tokens, layers = [], 0
    for prompt in task["prompts"]:
        cache = DynamicCache(config=model.config)
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=task["tokens"],
            do_sample=False,
            **{"cache" if known else "past_key_values": cache},
        )
        tokens.append(output[0, len(prompt) :].tolist())
        layers = sum(getattr(layer, "keys", None) is not None for layer in cache.layers)
    return {"version": __version__, "tokens": tokens, "kv_layers": layers}


if __name__ == "__main__":
    result = main(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
