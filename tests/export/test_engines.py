"""Exported models in the real engines: the table's rows, and what the table is too coarse for.

Run by `make test-export`, which makes the engines' environments first.
"""

from __future__ import annotations

import pytest

from benchmarks.engines import table
from benchmarks.engines.running import EngineRun, run_engine
from pruning.export.exporting import export
from pruning.export.pruned import Options
from tests.export.test_folders import DROPPED, PROMPT, ROPES
from tests.export.tiny_checkpoints import (
    TEXT,
    byte_fallback_tokenizer,
    greedy_tokens,
    load,
    plan_for,
    save_checkpoint,
)

pytestmark = pytest.mark.engines

COUNT = 12
TEXTS = [TEXT, "two  spaces\n\nand 12345 numbers, don't", "naïve façade 東京 🙂", ""]


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> table.Subject:
    return table.embedded(tmp_path_factory.mktemp("embedded") / "model")


@pytest.fixture(scope="module")
def divisible(tmp_path_factory) -> table.Subject:
    return table.eight_heads(tmp_path_factory.mktemp("divisible"))


def numbers(text: str) -> tuple[float, float]:
    before, after = text.split(" ", 3)[0], text.split("→ ")[1].split(" ")[0]
    return float(before.replace(",", "")), float(after.replace(",", ""))


class TestTable:
    def test_vllm(self, subject, divisible):
        row = table.vllm(subject, divisible)
        assert (row.version, row.same_tokens) == ("0.32.0", "yes")
        assert (row.tensor_parallel, row.pipeline_parallel) == ("yes", "yes")
        before, after = numbers(row.kv_saved)
        assert after / before == pytest.approx(30 / 22, rel=0.01)  # whole blocks of 128 tokens

    def test_llama_cpp(self, subject):
        row = table.llama_cpp(subject)
        assert row.same_tokens == "yes"
        before, after = numbers(row.kv_saved)
        assert after / before == pytest.approx(22 / 30)

    @pytest.mark.parametrize("environment", ["own", "vllm"])
    @pytest.mark.parametrize("format_name", ["nemotron-nas", "transformers"])
    def test_transformers(self, subject, format_name, environment):
        row = table.transformers(subject, format_name, environment)
        assert (row.same_tokens, row.kv_saved) == ("yes", "30 → 22 layers")

    def test_llm_drop(self, subject):
        row = table.transformers(subject, "llm-drop", "own")
        assert (row.same_tokens, row.kv_saved) == ("yes, of `full`", "30 → 30 layers")


def exported(tmp_path, source, format_name) -> tuple[str, list[int]]:
    """Export a tiny model; return where, and our greedy tokens."""
    base = load(source)
    out = tmp_path / "out.gguf"
    options = Options(10**9, "f32")
    export(str(source), plan_for(base, *DROPPED), format_name, out, options=options)
    return str(out), greedy_tokens(base, PROMPT, set(DROPPED), COUNT)


def llama_cpp(model: str, texts: list[str] = TEXTS) -> EngineRun:
    return run_engine(
        "llama-cpp",
        "run_llama_cpp.py",
        model=model,
        prompts=[PROMPT],
        tokens=COUNT,
        texts=texts,
    )


class TestLlamaCpp:
    @pytest.mark.parametrize(
        ("family", "config"),
        [
            *(("llama", {"rope_parameters": dict(rope)}) for rope in ROPES.values()),
            ("qwen2", {"tie_word_embeddings": True, "vocab_size": 340}),
            ("llama", {"attention_bias": True, "mlp_bias": True}),
            ("llama", {"head_dim": 32}),
        ],
        ids=[*ROPES, "qwen2", "biases", "wide-heads"],
    )
    def test_same_tokens(self, family, config, tmp_path):
        source = save_checkpoint(tmp_path / "base", family, **config)
        model, expected = exported(tmp_path, source, "gguf")
        assert llama_cpp(model, []).result["tokens"] == [expected]

    @pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
    def test_same_tokenizer(self, kind, tmp_path):
        tokenizer = byte_fallback_tokenizer()
        source = save_checkpoint(tmp_path / "base", vocab_size=len(tokenizer))
        if kind == "byte-fallback":
            tokenizer.save_pretrained(source)
        model, _ = exported(tmp_path, source, "gguf")
        ours = load(source).tokenizer
        expected = [ours(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        assert llama_cpp(model).result["tokenized"] == expected


def test_vllm_with_biases(tmp_path):
    source = save_checkpoint(
        tmp_path / "base",
        "qwen2",
        hidden_size=128,
        vocab_size=340,
        rope_parameters=dict(ROPES["llama3"]),
    )
    model, expected = exported(tmp_path, source, "nemotron-nas")
    run = run_engine(
        "vllm",
        "run_vllm.py",
        model=model,
        prompts=[PROMPT],
        tokens=COUNT,
        tensor_parallel=1,
        pipeline_parallel=1,
    )
    assert run.result["tokens"] == [expected]
