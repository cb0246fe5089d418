"""Exported folders, loaded by transformers, compute what our own pruned variant computes."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pruning.export.errors import ExportError
from pruning.export.exporting import export
from pruning.export.nemotron_nas import ffn_mult
from pruning.export.pruned import PLAN_FILE, Options
from pruning.families import FAMILIES
from pruning.llm_drop import read_drop_lists
from pruning.plan import PlanError, read_plan
from tests.export.tiny_checkpoints import (
    greedy_tokens,
    load,
    plan_for,
    pruned_logits,
    save_checkpoint,
)

DROPPED = (4, 1, 5)
PROMPT = [7, 31, 150, 9, 66, 201, 12, 93, 4, 88]

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def exported(folder, format_name, base, source, dropped=DROPPED, **options):
    export(str(source), plan_for(base, *dropped), format_name, folder, **options)
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()


def check_same(model, base, dropped=DROPPED):
    """Same logits; same greedy tokens through a cache that holds nothing for dropped layers."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
    ours = pruned_logits(base, PROMPT, set(dropped))
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-4)
    cache = DynamicCache(config=model.config)
    generated = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        **{_cache_argument(model): cache},
    )
    assert generated[0, len(PROMPT) :].tolist() == greedy_tokens(base, PROMPT, set(dropped), 12)
    used = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert len(used) == base.layers - len(dropped)


def _cache_argument(model):
    """transformers renamed it in 5.20."""
    import inspect

    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class TestTransformers:
    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_every_family(self, family, tmp_path):
        source = save_checkpoint(tmp_path / "base", family)
        base = load(source)
        model = exported(tmp_path / "out", "transformers", base, source)
        check_same(model, base)
        names = set(model.state_dict())
        assert not any(f"layers.{layer}.self_attn" in name for layer in DROPPED for name in names)

    def test_the_first_layer_of_a_type_may_be_dropped(self, tmp_path):
        types = ["sliding_attention", "full_attention", "full_attention"] * 2
        source = save_checkpoint(tmp_path / "base", "gemma3_text", layer_types=types)
        base = load(source)
        check_same(exported(tmp_path / "out", "transformers", base, source, (1,)), base, (1,))

    def test_it_is_not_mistaken_for_the_base_model(self, tmp_path):
        source = save_checkpoint(tmp_path / "base")
        exported(tmp_path / "out", "transformers", load(source), source)
        with pytest.raises(ValueError, match=r"attndrop_llama|trust_remote_code"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)

    def test_it_survives_saving(self, tmp_path):
        source = save_checkpoint(tmp_path / "base")
        base = load(source)
        exported(tmp_path / "out", "transformers", base, source).save_pretrained(tmp_path / "again")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        check_same(model, base)


class TestNemotronNas:
    @pytest.mark.parametrize("rope", sorted(ROPES))
    @pytest.mark.parametrize(
        ("family", "config"),
        [
            ("llama", {"tie_word_embeddings": True}),
            ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
            ("llama", {"head_dim": 32}),
            ("mistral", {"sliding_window": None}),
            ("qwen2", {}),
        ],
        ids=["tied", "biases", "wide-heads", "mistral", "qwen2"],
    )
    def test_same_as_ours(self, family, config, rope, tmp_path):
        source = save_checkpoint(
            tmp_path / "base", family, rope_parameters=dict(ROPES[rope]), **config
        )
        base = load(source)
        check_same(exported(tmp_path / "out", "nemotron-nas", base, source), base)

    def test_what_engines_read(self, tmp_path):
        source = save_checkpoint(tmp_path / "base", "qwen2")
        exported(tmp_path / "out", "nemotron-nas", load(source), source)
        raw = json.loads((tmp_path / "out" / "config.json").read_text())
        assert raw["architectures"] == ["DeciLMForCausalLM"]
        assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"]
        assert raw["block_configs"][4]["attention"] == {
            "no_op": True,
            "n_heads_in_group": None,
            "replace_with_linear": False,
        }
        config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
        for each in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            blocks = each.block_configs
            assert [b.attention.no_op for b in blocks] == [False, True, False, False, True, True]
            assert blocks[0].attention.n_heads_in_group == 2
            assert int(2 * blocks[0].ffn.ffn_mult * 64 / 3) == 256
            assert not blocks[0].ffn.no_op
        assert config.attention_bias
        assert config.to_dict()["block_configs"] == raw["block_configs"]

    def test_biases_of_o_are_zeros_where_the_model_has_none(self, tmp_path):
        source = save_checkpoint(tmp_path / "base", "qwen2")
        model = exported(tmp_path / "out", "nemotron-nas", load(source), source)
        state = model.state_dict()
        assert not state["model.layers.0.self_attn.o_proj.bias"].any()
        assert state["model.layers.0.self_attn.q_proj.bias"].any()
        assert "model.layers.1.self_attn.o_proj.bias" not in state
        assert "model.layers.1.input_layernorm.weight" not in state

    @pytest.mark.parametrize(
        ("hidden", "intermediate"),
        [(4096, 11008), (4096, 14336), (576, 1536), (8192, 28672), (896, 4864), (5120, 13824)],
    )
    def test_the_size_of_an_mlp_is_exact(self, hidden, intermediate):
        size = int(2 * ffn_mult(intermediate, hidden) * hidden / 3)
        assert -(-size // 256) * 256 == intermediate

    def test_every_multiple_of_256_is_exact(self):
        for hidden in (576, 2048, 3072, 3584, 5120):
            for intermediate in range(256, 32768, 256):
                self.test_the_size_of_an_mlp_is_exact(hidden, intermediate)


class TestRefusals:
    @pytest.mark.parametrize("format_name", ["nemotron-nas", "gguf"])
    @pytest.mark.parametrize(
        ("family", "config", "message"),
        [
            ("qwen3", {}, "cannot express a qwen3 model with QK-norm"),
            ("gemma2", {}, "a gemma2 model with sandwich norms"),
            ("gemma3_text", {}, "a gemma3_text model with sandwich norms, QK-norm"),
            ("olmo2", {}, "norms after the sublayers"),
            ("phi3", {}, "query, key and value in one tensor"),
            ("smollm3", {}, "layers without RoPE"),
            ("granite", {}, "multipliers"),
            ("mistral", {"sliding_window": 5}, r"sliding windows \(sliding_window is 5\)"),
            ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ],
    )
    def test_by_name_with_what_works(self, family, config, message, format_name, tmp_path):
        source = save_checkpoint(tmp_path / "base", family, **config)
        with pytest.raises(ExportError, match=message) as caught:
            export(str(source), plan_for(load(source), 1), format_name, tmp_path / "out")
        assert "--format transformers" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]

    def test_an_mlp_that_would_be_rounded(self, tmp_path):
        source = save_checkpoint(tmp_path / "base", intermediate_size=160)
        with pytest.raises(ExportError, match="an MLP of size 160: engines round it up"):
            export(str(source), plan_for(load(source), 1), "nemotron-nas", tmp_path / "out")

    def test_another_models_plan(self, tmp_path):
        one = save_checkpoint(tmp_path / "one")
        other = save_checkpoint(tmp_path / "other", initializer_range=0.3)
        with pytest.raises(PlanError, match="was made for the weights of one"):
            export(str(other), plan_for(load(one), 1), "transformers", tmp_path / "out")

    def test_an_existing_output(self, tmp_path):
        source = save_checkpoint(tmp_path / "base")
        with pytest.raises(ExportError, match="exists; remove it"):
            export(str(source), plan_for(load(source), 1), "transformers", source)

    def test_an_unknown_format(self, tmp_path):
        source = save_checkpoint(tmp_path / "base")
        with pytest.raises(ExportError, match="'onnx' is not one of nemotron-nas, transformers"):
            export(str(source), plan_for(load(source), 1), "onnx", tmp_path / "out")


class TestWhatComesAlong:
    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory):
        return save_checkpoint(tmp_path_factory.mktemp("models") / "base")

    @pytest.mark.parametrize("format_name", ["nemotron-nas", "transformers", "llm-drop"])
    def test_all_that_is_not_weights(self, source, format_name, tmp_path):
        plan = plan_for(load(source), *DROPPED)
        out = tmp_path / "out"
        export(str(source), plan, format_name, out)
        assert read_plan(out / PLAN_FILE) == plan
        generation = json.loads((out / "generation_config.json").read_text())
        assert (generation["eos_token_id"], generation["max_length"]) == ([2, 5], 77)
        original = AutoTokenizer.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer("The quick fox")["input_ids"] == original("The quick fox")["input_ids"]
        assert tokenizer.chat_template == original.chat_template
        assert (out / "LICENSE").read_text() == "a licence\n"

    def test_llm_drop_keeps_the_weights(self, source, tmp_path):
        out = tmp_path / "out"
        export(str(source), plan_for(load(source), *DROPPED), "llm-drop", out)
        old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
        lists = read_drop_lists(out / "config.json")
        assert (lists.attention, lists.mlp, lists.layers) == (DROPPED, (), 6)

    def test_shards_in_and_out(self, tmp_path):
        source = save_checkpoint(tmp_path / "base", shard="200KB")
        assert len(list(source.glob("*.safetensors"))) > 3
        base = load(source)
        model = exported(
            tmp_path / "out", "transformers", base, source, options=Options(300_000, "f16")
        )
        check_same(model, base)
        assert len(list((tmp_path / "out").glob("model-0000*-of-0000*.safetensors"))) > 2
