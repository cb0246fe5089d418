"""Tiny checkpoints on disk and plans for them, of sizes that engines accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pruning.loading import BaseModel, load_base_model
from pruning.plan import Plan, new_plan
from pruning.selection import DropStep
from pruning.sublayers import rows_attending
from tests.pruning.tiny_models import EXTRAS, TEMPLATE

TEXT = "The quick brown fox jumps over the lazy dog; 1234 sphinxes of black quartz, judge my vow."


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE tokenizer that splits words as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Return a small tokenizer like Llama 2's: BPE over characters, with bytes for all others."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *tokens], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_checkpoint(
    folder: Path, family: str = "llama", *, layers: int = 6, shard: str = "5GB", **config: Any
) -> Path:
    """Write a random model with a tokenizer and a generation config; return its folder."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family,
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "initializer_range": 0.2,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **EXTRAS.get(family, {}),
                **config,
            },
        )
    )
    _make_biases_count(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 5], max_length=77)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("a licence\n")
    return folder


def _make_biases_count(model: PreTrainedModel) -> None:
    """Biases start at zero, where a mistake with them would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.5)


def plan_for(base: BaseModel, *dropped: int) -> Plan:
    """Return a plan that drops these layers, in this order."""
    ranking = tuple(DropStep(layer, 0.5) for layer in dropped)
    return new_plan(base, "cosine", ranking, (0,), None).with_drop(len(dropped))


def load(folder: Path) -> BaseModel:
    return load_base_model(str(folder), dtype="float32", device="cpu")


def pruned_logits(base: BaseModel, tokens: list[int], dropped: set[int]) -> torch.Tensor:
    """Return what our own pruned variant computes, [rows, vocabulary]."""
    rows = torch.tensor([tokens])
    with torch.no_grad():
        return base.model(
            rows, attending_rows=rows_attending(base.layers, len(tokens), dropped)
        ).logits[0]


def greedy_tokens(base: BaseModel, tokens: list[int], dropped: set[int], count: int) -> list[int]:
    """Return the most likely continuation, computed from the start for every token."""
    sequence = list(tokens)
    for _ in range(count):
        sequence.append(int(pruned_logits(base, sequence, dropped)[-1].argmax()))
    return sequence[len(tokens) :]
