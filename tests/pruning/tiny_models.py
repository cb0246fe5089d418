"""Tiny random base models with a tokenizer of one token per ASCII character."""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pruning.loading import BaseModel, model_fingerprint
from pruning.sublayers import wrap

BOS, EOS = 1, 2
CHARACTERS = string.ascii_letters + string.digits + " .,:;!?'\"{}[]|\n"
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"

EXTRAS = {
    "mistral": {"sliding_window": 5},
    "phi3": {"sliding_window": 6},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "granite": {
        "residual_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "attention_multiplier": 0.2,
    },
}


def tiny_model(
    family: str = "llama", *, layers: int = 4, seed: int = 0, width: int = 32
) -> PreTrainedModel:
    """Return an unwrapped random model, the same for the same arguments."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **EXTRAS.get(family, {}),
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def tiny_base(
    family: str = "llama", *, layers: int = 4, seed: int = 0, adds_bos: bool = False
) -> BaseModel:
    """Return a wrapped tiny model with its tokenizer."""
    model = tiny_model(family, layers=layers, seed=seed)
    fingerprint = model_fingerprint(model)
    return BaseModel("tiny", model, tiny_tokenizer(adds_bos), fingerprint, tuple(wrap(model)))


def tiny_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def ids(text: str) -> list[int]:
    """Return the tokens of a text."""
    return [VOCABULARY.index(character) for character in text]
