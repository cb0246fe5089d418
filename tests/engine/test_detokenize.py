"""Text from tokens: byte-exact, whole characters, stop strings at any split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pruning.loading import BaseModel
from server.engine.detokenize import StopStrings, TextStream, UnknownDecoderError, Vocabulary
from tests.pruning.tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def vocabulary(base: BaseModel) -> Vocabulary:
    return Vocabulary(base.tokenizer)


TEXTS = [
    "Hello, world!",
    "  spaces\n\nand\ttabs ",
    "naïve café, 日本語のテキスト",
    "👩‍👩‍👧‍👦 🏳️‍🌈 family",
    "\x00\x07",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_tokens_one_by_one(
    text: str, base: BaseModel, vocabulary: Vocabulary
) -> None:
    tokens = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(vocabulary)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == text == vocabulary.text(tokens)
    assert all("\ufffd" not in piece for piece in pieces)


@given(tokens=st.lists(st.integers(0, 49151), max_size=40))
def test_any_tokens_give_what_the_tokenizer_decodes(
    base: BaseModel, vocabulary: Vocabulary, tokens: list[int]
) -> None:
    stream = TextStream(vocabulary)
    grown = "".join(stream.push(token) for token in tokens) + stream.flush()
    decoded = base.tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert grown == decoded == vocabulary.text(tokens)


def test_special_tokens_have_no_text_but_a_name(base: BaseModel, vocabulary: Vocabulary) -> None:
    end = base.tokenizer.eos_token_id
    assert TextStream(vocabulary).push(end) == ""
    assert vocabulary.token_text(end) == "<|im_end|>"


def test_a_token_that_is_no_character_is_named_by_its_bytes(
    base: BaseModel, vocabulary: Vocabulary
) -> None:
    parts = base.tokenizer("👩", add_special_tokens=False)["input_ids"]
    assert len(parts) > 1
    assert vocabulary.token_text(parts[0]).startswith("bytes:\\x")


def test_sentencepiece_with_byte_fallback() -> None:
    pieces = ["<unk>", "<s>", "</s>", "\u2581Hello", "\u2581world", "<0xE2>", "<0x82>", "<0xAC>"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.text([1, 3, 4, 5, 6, 7, 2]) == " Hello world€"
    assert vocabulary.token_text(5) == "bytes:\\xe2"


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(UnknownDecoderError, match="byte-level BPE and SentencePiece"):
        Vocabulary(tiny_tokenizer(False))


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
def test_stop_strings_cut_at_the_first_match_however_text_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    matcher, shown, stopped = StopStrings(stops), "", False
    for start, end in pairwise(bounds):
        matched = matcher.push(text[start:end])
        shown += matched.text
        assert text.startswith(shown)
        stopped = matched.stopped
        if stopped:
            break
    shown += "" if stopped else matcher.flush()
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    assert stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert not any(stop in shown for stop in stops)
        assert any(text.startswith(shown + stop) for stop in stops)
