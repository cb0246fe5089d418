"""The gguf format, read back with gguf's own reader and with transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pruning.export.errors import ExportError
from pruning.export.exporting import export
from pruning.export.gguf_file import TYPES, interleaved, rope_factors
from pruning.export.gguf_tokenizer import split_name
from pruning.export.pruned import Options
from pruning.loading import EMBEDDED_MODEL, gguf_file
from tests.export.test_folders import ROPES
from tests.export.tiny_checkpoints import (
    byte_fallback_tokenizer,
    load,
    plan_for,
    save_checkpoint,
)

DROPPED = (4, 1, 5)
GONE = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")


def exported(tmp_path, source, kind="f32"):
    out = tmp_path / "model.gguf"
    options = Options(10**9, kind)
    export(str(source), plan_for(load(source), *DROPPED), "gguf", out, options=options)
    return GGUFReader(out)


def value(reader, key):
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


@pytest.mark.parametrize("kind", TYPES)
def test_tensors_are_the_models(kind, tmp_path):
    source = save_checkpoint(tmp_path / "base", "qwen2", tie_word_embeddings=True, vocab_size=340)
    reader = exported(tmp_path, source, kind)
    tensors = {
        t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type)))
        for t in reader.tensors
    }
    for layer in range(6):
        for part in GONE:
            assert (f"blk.{layer}.{part}.weight" in tensors) == (layer not in DROPPED)
    assert "output.weight" not in tensors
    state = load(source).model.state_dict()
    layer = "model.layers.2.attention.attention"
    bits = {"f32": 24, "f16": 11, "bf16": 8, "q8_0": 7, "q4_0": 3, "q4_1": 4}[kind]

    def check(name, expected):
        assert tensors[name].shape == expected.shape
        worst = (tensors[name] - expected).abs().max() / expected.abs().max()
        assert worst <= 2.0**-bits

    check("token_embd.weight", state["model.embed_tokens.weight"])
    check("blk.2.attn_q.weight", interleaved(state[f"{layer}.q_proj.weight"], 4))
    check("blk.2.attn_k.weight", interleaved(state[f"{layer}.k_proj.weight"], 2))
    check("blk.2.attn_v.weight", state[f"{layer}.v_proj.weight"])
    assert torch.equal(tensors["blk.2.attn_q.bias"], interleaved(state[f"{layer}.q_proj.bias"], 4))
    assert {t.tensor_type for t in reader.tensors if len(t.shape) == 1} == {
        GGMLQuantizationType.F32
    }


def test_facts(tmp_path):
    reader = exported(tmp_path, save_checkpoint(tmp_path / "base", head_dim=32))
    assert value(reader, "general.architecture") == "deci"
    assert value(reader, "deci.block_count") == 6
    assert value(reader, "deci.attention.head_count") == [4, 0, 4, 4, 0, 0]
    assert value(reader, "deci.attention.head_count_kv") == [2, 0, 2, 2, 0, 0]
    assert value(reader, "deci.feed_forward_length") == [256] * 6
    assert value(reader, "deci.attention.key_length") == 32
    assert value(reader, "deci.rope.dimension_count") == 32
    assert value(reader, "general.file_type") == 0
    assert "output.weight" in {tensor.name for tensor in reader.tensors}


def test_pairs_that_rope_turns_together_become_neighbours():
    heads, width = 2, 8
    rows = torch.arange(heads * width).reshape(-1, 1).float()
    assert interleaved(rows, heads).reshape(heads, width).tolist() == [
        [0, 4, 1, 5, 2, 6, 3, 7],
        [8, 12, 9, 13, 10, 14, 11, 15],
    ]


class TestRope:
    def test_llama3_factors_are_those_of_transformers(self, tmp_path):
        source = save_checkpoint(tmp_path / "base", rope_parameters=dict(ROPES["llama3"]))
        config = load(source).model.config
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 500.0 ** -(torch.arange(0, 16, 2) / 16)
        factors = torch.from_numpy(rope_factors(config.rope_parameters, 16))
        torch.testing.assert_close(plain / factors, scaled)
        assert len(factors.unique()) > 2
        written = {t.name: t.data for t in exported(tmp_path, source).tensors}
        assert torch.equal(torch.from_numpy(np.array(written["rope_freqs.weight"])), factors)

    @pytest.mark.parametrize("kind", ["linear", "yarn"])
    def test_scaling(self, kind, tmp_path):
        source = save_checkpoint(tmp_path / "base", rope_parameters=dict(ROPES[kind]))
        reader = exported(tmp_path, source)
        assert value(reader, "deci.rope.scaling.type") == kind
        assert value(reader, "deci.rope.scaling.factor") == ROPES[kind]["factor"]
        assert value(reader, "deci.rope.freq_base") == 500.0

    @pytest.mark.parametrize(
        ("rope", "message"),
        [
            ({"rope_type": "dynamic", "factor": 2.0}, "RoPE scaling 'dynamic', only default"),
            ({**ROPES["yarn"], "attention_factor": 1.5}, "YaRN with attention_factor"),
        ],
    )
    def test_refused(self, rope, message, tmp_path):
        config = {"rope_parameters": {"rope_theta": 500.0, **rope}}
        source = save_checkpoint(tmp_path / "base", **config)
        with pytest.raises(ExportError, match=message):
            exported(tmp_path, source)


class TestTokenizer:
    def test_byte_level(self, tmp_path):
        source = save_checkpoint(tmp_path / "base", vocab_size=340)
        tokenizer = load(source).tokenizer
        reader = exported(tmp_path, source)
        assert value(reader, "tokenizer.ggml.model") == "gpt2"
        assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
        tokens = value(reader, "tokenizer.ggml.tokens")
        assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        assert tokens[len(tokenizer) :] == [f"[PAD{i}]" for i in range(len(tokenizer), 340)]
        types = value(reader, "tokenizer.ggml.token_type")
        assert (types[:4], types[-1]) == ([3, 3, 3, 1], 5)
        assert value(reader, "tokenizer.ggml.eos_token_id") == 2
        assert value(reader, "tokenizer.ggml.add_bos_token") is False
        assert value(reader, "tokenizer.chat_template") == tokenizer.chat_template

    def test_byte_fallback(self, tmp_path):
        tokenizer = byte_fallback_tokenizer()
        source = save_checkpoint(tmp_path / "base", vocab_size=len(tokenizer))
        tokenizer.save_pretrained(source)
        reader = exported(tmp_path, source)
        assert value(reader, "tokenizer.ggml.model") == "llama"
        types = value(reader, "tokenizer.ggml.token_type")
        assert types[:4] == [2, 3, 3, 6]
        tokens = value(reader, "tokenizer.ggml.tokens")
        scores = value(reader, "tokenizer.ggml.scores")
        merged = [s for t, s in zip(tokens, scores, strict=True) if len(t) == 2]
        assert min(merged) > scores[tokens.index("a")]
        assert value(reader, "tokenizer.ggml.add_space_prefix") is True

    def test_names_of_splits(self):
        llama3 = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
            r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}

        def steps(*each):
            return {"type": "Sequence", "pretokenizers": list(each)}

        def split(regex):
            return {"type": "Split", "pattern": {"Regex": regex}, "invert": False}

        assert split_name(steps(split(llama3), bytes_only), "x") == "llama-bpe"
        qwen = llama3.replace(r"\p{N}{1,3}", r"\p{N}")
        assert split_name(steps(split(qwen), bytes_only), "x") == "qwen2"
        digits = {"type": "Digits", "individual_digits": True}
        assert split_name(steps(digits, {**bytes_only, "use_regex": True}), "x") == "smollm"
        with pytest.raises(ExportError, match="the way the tokenizer of x splits words"):
            split_name(steps(split(r"\d"), bytes_only), "x")


@pytest.mark.engines
def test_the_embedded_model_keeps_its_tokenizer_and_values(base, tmp_path):
    """In the slow tests only because quantising in Python takes 15 s."""
    out = tmp_path / "model.gguf"
    plan = plan_for(base, 25, 26)
    export(EMBEDDED_MODEL, plan, "gguf", out, options=Options(10**9, "q4_1"))
    reader, original = GGUFReader(out), GGUFReader(gguf_file(EMBEDDED_MODEL))
    for key in (f"tokenizer.ggml.{part}" for part in ("pre", "merges", "tokens", "token_type")):
        assert value(reader, key) == value(original, key)
    old = {t.name: t for t in original.tensors}
    for tensor in reader.tensors:
        assert tensor.tensor_type == old[tensor.name].tensor_type
        new_values = dequantize(tensor.data, tensor.tensor_type)
        old_values = dequantize(old[tensor.name].data, tensor.tensor_type)
        np.testing.assert_allclose(new_values, old_values, rtol=0, atol=1e-6)
    assert out.stat().st_size < gguf_file(EMBEDDED_MODEL).stat().st_size
