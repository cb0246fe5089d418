"""What the endpoints share: the engine's verbs, the tokenizer, the names models go by."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from transformers import PreTrainedTokenizerBase

from server.api.errors import bad_request, model_not_found
from server.engine.detokenize import Vocabulary
from server.engine.engine import Engine
from server.evidence import Evidence
from server.metrics import Metrics

VARIANT_HEADER = "X-Model-Variant"

_INLINE_CHARACTERS = 4096
"""Texts that are longer together are tokenised off the event loop."""


@dataclass(slots=True)
class Service:
    """The state of one server. Made once at start; only `draining` changes."""

    engine: Engine
    metrics: Metrics
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    vocabulary_size: int
    end_tokens: frozenset[int]
    """Tokens with which the model ends its text."""
    model_name: str
    model_fingerprint: str
    plan_id: str
    evidence: Mapping[str, Evidence]
    """Of each variant, by name."""
    version: str
    default_variant: str
    created: int
    """Unix time, for the models list."""
    draining: bool = field(default=False)

    @property
    def model_ids(self) -> list[str]:
        """Every name a client may use: the model's own, and one for each variant."""
        variants = (f"{self.model_name}:{variant.name}" for variant in self.engine.variants)
        return [self.model_name, *variants]

    def resolve_variant(self, model: str | None, headers: Headers) -> str:
        """Return the variant that a model id and the variant header ask for together.

        Raises:
            ApiError: 404 for an unknown model; 400 for an unknown variant or a contradiction.
        """
        named = None if model is None else self.variant_of_model(model)
        asked = self._variant_of_header(headers)
        if named and asked and named != asked:
            raise bad_request(
                f"the header {VARIANT_HEADER} says {asked!r} but the model id says {named!r}; "
                "send one of them, or the same in both",
                param="model",
                code="variant_conflict",
            )
        return named or asked or self.default_variant

    def variant_of_model(self, model: str) -> str | None:
        """Return the variant that a model id names; the bare model name says nothing.

        Raises:
            ApiError: 404 for a name that this server does not have.
        """
        if model not in self.model_ids:
            raise model_not_found(model, self.model_ids)
        return model[len(self.model_name) + 1 :] or None

    def _variant_of_header(self, headers: Headers) -> str | None:
        asked = {value.strip().lower() for value in headers.getlist(VARIANT_HEADER)}
        if not asked:
            return None
        choices = [variant.name for variant in self.engine.variants]
        if len(asked) > 1 or not asked <= set(choices):
            raise bad_request(
                f"the header {VARIANT_HEADER} must be one of: {', '.join(choices)}; "
                f"not {', '.join(sorted(asked))[:200]!r}",
                param=VARIANT_HEADER,
                code="unknown_variant",
            )
        return asked.pop()

    def system_fingerprint(self, variant: str) -> str:
        """Return what identifies the weights, the plan, the variant and the software together."""
        parts = (self.model_fingerprint, self.plan_id, variant, self.version)
        return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    async def tokenize(self, texts: Sequence[str], *, special: bool) -> list[tuple[int, ...]]:
        """Return the token ids of texts, with the special tokens the model expects or without."""

        def encode() -> list[tuple[int, ...]]:
            return [
                tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])
                for text in texts
            ]

        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return encode()
        return await asyncio.to_thread(encode)

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            ApiError: 400.
        """
        if tokens and max(tokens) >= self.vocabulary_size:
            raise bad_request(
                f"token id {max(tokens)} is beyond the vocabulary of {self.vocabulary_size}", param
            )

    @property
    def first_token(self) -> int:
        """The token that an empty prompt stands for: the beginning of a text."""
        first = self.tokenizer.bos_token_id
        if first is None:
            first = self.tokenizer.eos_token_id
        return int(first if first is not None else 0)
