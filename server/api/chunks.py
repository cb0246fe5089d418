"""The chunks of one stream: what is the same in all of them is encoded once.

    data: {"id":"cmpl-1", ... ,"choices":[ {"index":0,"text":" the", ... } ],"usage":null}
    `--------------- once -------------'  `------- for each token ------'  `--- once ---'

A chunk holds one choice, as both streaming endpoints send it. The bytes are those that encoding
the whole object would give.
"""

from __future__ import annotations

import json

from server.api.answers import Json
from server.engine.request import FinishReason

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_FINISH: dict[FinishReason | None, str] = {
    None: "null",
    **{reason: _encode(reason.value) for reason in FinishReason},
}


class Chunks:
    """Makes the events of one stream."""

    def __init__(self, before: Json, after: Json | None = None) -> None:
        """`before` and `after` are what an object holds before and after its choices."""
        self._head = f'data: {_encode(before)[:-1]},"choices":['
        self._tail = f"],{_encode(after)[1:]}\n\n" if after else "]}\n\n"

    def of_text(
        self, index: int, text: str, logprobs: Json | None, finish: FinishReason | None
    ) -> str:
        """Return the event that adds text to a completion."""
        return self._chunk(index, f'"text":{_encode(text)}', logprobs, finish)

    def of_content(
        self, index: int, content: str | None, logprobs: Json | None, finish: FinishReason | None
    ) -> str:
        """Return the event that adds content to a chat message; None adds nothing."""
        delta = "{}" if content is None else f'{{"content":{_encode(content)}}}'
        return self._chunk(index, f'"delta":{delta}', logprobs, finish)

    def _chunk(
        self, index: int, added: str, logprobs: Json | None, finish: FinishReason | None
    ) -> str:
        shown = "null" if logprobs is None else _encode(logprobs)
        choice = f'{{"index":{index},{added},"logprobs":{shown},"finish_reason":{_FINISH[finish]}}}'
        return f"{self._head}{choice}{self._tail}"
