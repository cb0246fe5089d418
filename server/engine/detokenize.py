"""Tokens to text: the bytes of every token, text that grows token by token, stop strings.

Text is built from each token's own bytes through an incremental UTF-8 decoder, so a token costs
the same at any length and a character split over tokens comes out whole. Two kinds of tokenizer
are understood, which cover the supported families: byte-level BPE (GPT-2's byte alphabet) and
SentencePiece-like vocabularies with byte fallback.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


class UnknownDecoderError(ValueError):
    """The tokenizer turns tokens into text in a way that is not understood."""


class Vocabulary:
    """The bytes of every token of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UnknownDecoderError for a tokenizer of another kind."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        marked = {index for index, token in added.items() if token.special}
        self._special = frozenset(marked | set(tokenizer.all_special_ids))
        self._added = {index: token.content for index, token in added.items()}
        self._byte_level = _is_byte_level(tokenizer)
        self._alphabet = {char: byte for byte, char in _gpt2_bytes().items()}
        self.token_bytes = cache(self._token_bytes)
        self.token_text = cache(self._token_text)
        self.whole_text = cache(self._whole_text)

    def is_special(self, token: int) -> bool:
        """Whether the token is a mark that text leaves out, like end-of-sequence."""
        return token in self._special

    def text(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, special ones left out."""
        shown = (self.token_bytes(token) for token in tokens if not self.is_special(token))
        return b"".join(shown).decode("utf-8", errors="replace")

    def _token_text(self, token: int) -> str:
        """Return a token's text; one that is no valid UTF-8 by itself becomes `bytes:\\x..`."""
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _whole_text(self, token: int) -> str | None:
        """Return what a token adds to whole characters; None if they would not be whole then."""
        if self.is_special(token):
            return ""
        try:
            return self.token_bytes(token).decode("utf-8")
        except UnicodeDecodeError:
            return None

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""  # a row of the embedding that pads the vocabulary
        if self._byte_level:
            return bytes(self._alphabet[char] for char in piece)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(_SPACE, " ").encode()


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend else "none"
    if "ByteLevel" in decoder:
        return True
    if "ByteFallback" in decoder or "Metaspace" in decoder:
        return False
    raise UnknownDecoderError(
        f"the tokenizer decodes by {decoder[:200]}; byte-level BPE and SentencePiece with byte "
        "fallback are understood"
    )


def _gpt2_bytes() -> dict[int, str]:
    return bytes_to_unicode()  # type: ignore[no-untyped-call,no-any-return]


class TextStream:
    """The text of one growing sequence of tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unfinished = False
        """Whether the decoder holds the beginning of a character."""

    def push(self, token: int) -> str:
        """Return the characters that the token completes."""
        if not self._unfinished:
            text = self._vocabulary.whole_text(token)
            if text is not None:
                return text
        if self._vocabulary.is_special(token):
            return ""
        text = self._decoder.decode(self._vocabulary.token_bytes(token))
        self._unfinished = self._decoder.getstate()[0] != b""
        return text

    def flush(self) -> str:
        """Return what an unfinished character looks like at the end."""
        self._unfinished = False
        return self._decoder.decode(b"", final=True)


class Matched(NamedTuple):
    """Text that may be shown, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopStrings:
    """Cuts a growing text before the first stop string that appears in it.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> Matched:
        """Add text; return what can be shown now."""
        if not self._stops:
            return Matched(text, False)
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return Matched(text[: min(found)], True)
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return Matched(text[: len(text) - keep], False)

    def flush(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
