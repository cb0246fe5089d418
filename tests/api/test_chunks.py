"""Chunks are byte for byte what encoding the whole object gives."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest

from server.api.chunks import Chunks
from server.engine.request import FinishReason

HEADER = {"id": 'cmpl-"1"', "object": "text_completion", "created": 17, "model": "naïve\n日本"}
USAGES = [{"usage": None}, {"usage": {"prompt_tokens": 3, "prompt_tokens_details": None}}]
AROUND = [pair for usage in USAGES for pair in (({}, usage), (usage, {}))]
"""What stands before the choices and after them."""
TEXTS = ["", " the", 'say "no"\\', "\n\t\x00\x1f\x7f", "日本語 👩‍👩‍👧‍👦\u2028", "{}[],:"]
LOGPROBS: list[dict[str, Any] | None] = [
    None,
    {},
    {"tokens": [" a"], "token_logprobs": [None], "top_logprobs": [{"é": -0.1}], "text_offset": [0]},
    {"content": [{"token": "a", "logprob": -9999.0, "bytes": [97]}], "refusal": None},
]
CHOICES = list(product([0, 127], TEXTS, LOGPROBS, [None, *FinishReason]))


def encoded(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n"


def choice(index: int, added: dict[str, Any], logprobs: Any, end: FinishReason | None) -> Any:
    finish = end.value if end else None
    return {"index": index, **added, "logprobs": logprobs, "finish_reason": finish}


@pytest.mark.parametrize(("before", "after"), [({}, {}), *AROUND])
def test_every_combination_of_fields(before: dict[str, Any], after: dict[str, Any]) -> None:
    chunks = Chunks({**HEADER, **before}, after)
    for index, text, logprobs, end in CHOICES:
        for made, added in (
            (chunks.of_text(index, text, logprobs, end), {"text": text}),
            (chunks.of_content(index, text, logprobs, end), {"delta": {"content": text}}),
            (chunks.of_content(index, None, logprobs, end), {"delta": {}}),
        ):
            choices = [choice(index, added, logprobs, end)]
            assert made == encoded({**HEADER, **before, "choices": choices, **after})


def test_numbers_that_json_does_not_have_are_errors() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Chunks(HEADER).of_text(0, "", {"token_logprobs": [float("-inf")]}, None)
