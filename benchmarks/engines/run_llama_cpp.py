"""Runs a GGUF file in llama.cpp. Run by `running.run_engine` with the environment's own Python."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from llama_cpp import GGML_TYPE_F32, Llama, __version__


def main(task: dict[str, Any]) -> dict[str, Any]:
    model = Llama(
        task["model"],
        n_ctx=1024,
        n_threads=1,
        flash_attn=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=True,  # the size of the KV buffer is only said in the log
    )
    return {
        "version": __version__,
        "tokens": [_greedy(model, prompt, task["tokens"]) for prompt in task["prompts"]],
        "tokenized": [
            model.tokenize(text.encode(), add_bos=False, special=True)
            for text in task.get("texts", [])
        ],
    }


def _greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    model.reset()
    chosen = model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
    return list(islice(chosen, count))


if __name__ == "__main__":
    result = main(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
