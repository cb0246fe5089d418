"""Token counts as answers report them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one HTTP request: each prompt once, all choices that were generated."""

    prompt_tokens: int
    completion_tokens: int

    def plus(self, generated: int) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens + generated)

    def json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
