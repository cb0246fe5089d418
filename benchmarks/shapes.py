"""Named model shapes with random weights, made directly on the device that is measured.

The figures are those of the public checkpoints; what is random says nothing about quality, and a
step takes as long as it would with the real weights. The context is raised to hold 8192 tokens.
Without an end-of-sequence token, so that ours and peers generate as many tokens as were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from pruning.loading import DTYPES, BaseModel
from pruning.sublayers import wrap
from pruning.variants import FULL, Variant, Variants

PRUNED = "pruned"
"""The variant that drops attention."""
CONTEXT = 8192
"""Longest sequence of every shape, in tokens."""
_SEED = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """The figures of a Llama model."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    rope_theta: float
    tied: bool
    """Whether the LM head is the embedding matrix."""


SHAPES: Mapping[str, Shape] = {
    "llama-2-7b": Shape(32_000, 4096, 11_008, 32, 32, 32, 10_000, tied=False),
    "llama-2-13b": Shape(32_000, 5120, 13_824, 40, 40, 40, 10_000, tied=False),
    "llama-3-8b": Shape(128_256, 4096, 14_336, 32, 32, 8, 500_000, tied=False),
    "smollm2-135m": Shape(49_152, 576, 1536, 30, 9, 3, 100_000, tied=True),
    "tiny": Shape(256, 64, 128, 4, 4, 2, 10_000, tied=False),
}


def llama_config(shape: str, layers: int | None = None) -> LlamaConfig:
    """Return the transformers config of a named shape, cut to `layers` layers if given.

    Raises:
        ValueError: there is no such shape, or it has fewer layers.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    figures = SHAPES[shape]
    if layers is not None and not 1 <= layers <= figures.layers:
        raise ValueError(f"{layers} layers of {shape} were asked for; give 1 to {figures.layers}")
    return LlamaConfig(
        vocab_size=figures.vocabulary,
        hidden_size=figures.width,
        intermediate_size=figures.mlp_width,
        num_hidden_layers=layers or figures.layers,
        num_attention_heads=figures.heads,
        num_key_value_heads=figures.kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": float(figures.rope_theta)},
        tie_word_embeddings=figures.tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_model(
    shape: str, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> PreTrainedModel:
    """Return an unwrapped model of random weights, the same for the same arguments.

    Every weight is normal with deviation 0.02, allocated once, on the device and in its dtype.

    Raises:
        ValueError: there is no such shape, or it has fewer layers.
    """
    config = llama_config(shape, layers)
    torch.manual_seed(_SEED)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype
        )
    torch.nn.Module.eval(model).requires_grad_(False)
    return model


def random_base(
    shape: str, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> BaseModel:
    """Return `random_model` wrapped, as an engine takes it. Its tokenizer knows no text.

    Raises:
        ValueError: there is no such shape, or it has fewer layers.
    """
    model = random_model(shape, dtype, device, layers)
    nothing = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=nothing, unk_token="<unk>"
    )
    return BaseModel(shape, model, tokenizer, f"random:{_SEED}", tuple(wrap(model)))


def dropping_each(layers: int, counts: Mapping[str, int]) -> Variants:
    """Return `full` and one variant for each name, which drops that many layers.

    The last layers go first and layer 0 stays: deeper attention is what the paper finds redundant.

    Raises:
        ValueError: more layers are to be dropped than may.
    """
    every = frozenset(range(layers))
    variants = [Variant(FULL, every)]
    for name, count in counts.items():
        if not 0 <= count < layers:
            raise ValueError(f"cannot drop {count} of {layers} layers; drop 0 to {layers - 1}")
        variants.append(Variant(name, every - frozenset(range(layers - count, layers))))
    return Variants(layers, variants)


def dropping(layers: int, count: int) -> Variants:
    """Return `full` and `pruned`, which drops `count` layers.

    Raises:
        ValueError: more layers are to be dropped than may.
    """
    return dropping_each(layers, {PRUNED: count})


def half_dropped(layers: int) -> Variants:
    """Return `full` and `pruned`, which drops half of the layers."""
    return dropping(layers, layers // 2)


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return what is meant; auto is what a server would use: cuda where there is one, and
    float32 on a CPU, else bfloat16.

    Raises:
        ValueError: there is no such dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return torch.device(device), DTYPES[dtype]
