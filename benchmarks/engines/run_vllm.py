"""Runs a checkpoint in vLLM. Run by `running.run_engine` with the environment's own Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, __version__


def main(task: dict[str, Any]) -> dict[str, Any]:
    # vLLM's CPU worker passes hidden states between pipeline stages only after a warm-up, which it
    # leaves out where nothing is compiled.
    eager = {"enforce_eager": True}
    traced = {"compilation_config": {"mode": 1, "backend": "eager"}}
    llm = LLM(
        model=task["model"],
        trust_remote_code=True,
        dtype="float32",
        max_model_len=256,
        tensor_parallel_size=task["tensor_parallel"],
        pipeline_parallel_size=task["pipeline_parallel"],
        **(eager if task["pipeline_parallel"] == 1 else traced),
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in task["prompts"]],
        SamplingParams(temperature=0, max_tokens=task["tokens"], ignore_eos=True),
    )
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "version": __version__,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "kv_capacity_tokens": cache.num_gpu_blocks * cache.block_size,
    }


if __name__ == "__main__":
    result = main(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
