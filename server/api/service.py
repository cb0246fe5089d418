"""What the endpoints share: the engine's verbs and the tokenizer, beside what every front has."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from server.api.errors import ApiError, bad_request, unavailable
from server.api.front import Front
from server.api.mailbox import Mailbox
from server.engine.detokenize import Vocabulary
from server.engine.engine import Engine
from server.evidence import Evidence

_INLINE_CHARACTERS = 4096
"""Texts that are longer together are tokenised off the event loop."""


@dataclass(slots=True, kw_only=True)
class Service(Front):
    """A front with an engine behind it."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    vocabulary_size: int
    end_tokens: frozenset[int]
    """Tokens with which the model ends its text."""
    model_fingerprint: str
    plan_ids: Mapping[str, str]
    """The plan of each variant, by name; `plan_id` is the one of most."""
    evidence: Mapping[str, Evidence]
    """Of each variant, by name."""
    mailbox: Mailbox = field(init=False, default_factory=Mailbox)
    """Through which the engine's events come."""

    @property
    def variant_names(self) -> Sequence[str]:
        return [variant.name for variant in self.engine.variants]

    @property
    def alive(self) -> bool:
        return self.engine.stats().alive

    def dead(self) -> ApiError:
        return unavailable("the engine is dead; restart the server", "engine_dead")

    @property
    def busy(self) -> bool:
        return any(v.running or v.waiting for v in self.engine.stats().variants)

    def facts(self, variant: str) -> dict[str, Any]:
        info = next(info for info in self.engine.describe() if info.name == variant)
        evidence = self.evidence[variant]
        return {
            "max_model_len": self.engine.limit(variant),
            "variant": {
                "plan": self.plan_ids[variant],
                "attention_layers": info.attention_layers,
                "dropped_layers": list(info.dropped_layers),
                "dropped_mlps": list(info.dropped_mlps),
                "kv_bytes_per_token": info.kv_bytes_per_token,
                "quality": None if evidence.quality is None else asdict(evidence.quality),
                "substitutes": {
                    "parameters": evidence.substitute_parameters,
                    "bytes": evidence.substitute_bytes,
                },
            },
        }

    def system_fingerprint(self, variant: str) -> str:
        """Return what identifies the weights, the plan, the variant and the software together."""
        parts = (self.model_fingerprint, self.plan_ids[variant], variant, self.version)
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
