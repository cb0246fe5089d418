"""Token counts as answers report them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request: each prompt once, all choices that were generated."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    """Prompt tokens that were not computed again; None until all choices have ended."""

    def json(self) -> dict[str, Any]:
        cached = self.cached_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
        }
