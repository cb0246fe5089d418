"""A tokenizer as GGUF metadata.

Where the checkpoint was converted from a GGUF file, that file's own entries are copied. Otherwise
they are made from the fast tokenizer: byte-level BPE whose way of splitting words llama.cpp knows
by name, or BPE with byte fallback (SentencePiece). For the latter, llama.cpp puts a space before
every text; transformers, for some models, only before one that does not begin with a space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
from gguf import TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pruning.export.errors import ExportError
from pruning.export.pruned import Pruned

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names for regular expressions that split text into words.
_SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}
_SPECIAL = ("bos", "eos", "unk", "pad")


def add_tokenizer(writer: gguf.GGUFWriter, pruned: Pruned) -> None:
    """Write the tokenizer's entries.

    Raises:
        ExportError: llama.cpp has no tokenizer like it.
    """
    if pruned.source_gguf is not None:
        _copy(writer, gguf.GGUFReader(pruned.source_gguf))
        return
    tokenizer = AutoTokenizer.from_pretrained(pruned.checkpoint.folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ExportError(f"the tokenizer of {pruned.name} has no fast form, which gguf needs")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE":
        raise ExportError(
            f"llama.cpp has no tokenizer for {pruned.name}: its model is "
            f"{content['model']['type']}, and only BPE is supported"
        )
    size = pruned.config.vocab_size
    if (needed := len(tokenizer)) > size:
        raise ExportError(
            f"the tokenizer of {pruned.name} has {needed} tokens, but the model only {size}"
        )
    if content["model"].get("byte_fallback"):
        _add_sentencepiece(writer, content, size)
    else:
        _add_byte_level(writer, content, size, pruned.name)
    _add_special(writer, tokenizer)


def _copy(writer: gguf.GGUFWriter, reader: gguf.GGUFReader) -> None:
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)


def _add_byte_level(
    writer: gguf.GGUFWriter, content: Mapping[str, Any], size: int, name: str
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(content["pre_tokenizer"], name))
    tokens, types = _tokens(content, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in _merges(content)])


def split_name(pre_tokenizer: Mapping[str, Any] | None, name: str) -> str:
    """Return llama.cpp's name for the way a byte-level tokenizer splits text into words.

    Raises:
        ExportError: it has none.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if regex in _SPLITS:
            return _SPLITS[regex]
    raise ExportError(
        f"llama.cpp's name for the way the tokenizer of {name} splits words is not known here "
        f"({json.dumps(pre_tokenizer)[:200]}); add it to pruning/export/gguf_tokenizer.py, or "
        "start from a GGUF file of the model, whose tokenizer is copied"
    )


def _add_sentencepiece(writer: gguf.GGUFWriter, content: Mapping[str, Any], size: int) -> None:
    """llama.cpp merges the pair whose result scores highest; so a token scores by its merge."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    tokens, types = _tokens(content, size)
    merges = _merges(content)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(_prepends_space(content))


def _prepends_space(content: Mapping[str, Any]) -> bool:
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    pre = content.get("pre_tokenizer") or {}
    return pre.get("type") == "Metaspace" and pre.get("prepend_scheme") != "never"


def _tokens(content: Mapping[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Return the text and type of every token id of the model; ids without a token are unused."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    fallback = bool(content["model"].get("byte_fallback"))
    for token, index in content["model"]["vocab"].items():
        tokens[index] = token
        byte = fallback and len(token) == 6 and token.startswith("<0x")
        types[index] = TokenType.BYTE if byte else TokenType.NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = content["model"].get("unk_token")
    if fallback and unknown in tokens:
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, types


def _merges(content: Mapping[str, Any]) -> list[Sequence[str]]:
    merges = content["model"]["merges"]
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    for kind in _SPECIAL:
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    framed = tokenizer("a")["input_ids"]
    assert isinstance(framed, list)
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and framed[0] == tokenizer.bos_token_id
    )
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and framed[-1] == tokenizer.eos_token_id
    )
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
