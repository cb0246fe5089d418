"""The chunks of one stream: what is the same in all of them is encoded once.

    data: {"id":"cmpl-1", ... ,"choices":[ {"index":0,"text":" the", ... } ],"usage":null}
    `--------------- once -------------'  `------- for each token ------'  `--- once ---'

A chunk holds one choice, as both streaming endpoints send it. The bytes are those that encoding
the whole object would give.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring as _quoted

from server.api.answers import Json, Write
from server.api.generation import Delta, Generation
from server.api.schema import StreamOptions
from server.api.usage import Usage
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
        return self._chunk(index, f'"text":{_quoted(text)}', logprobs, finish)

    def of_content(
        self, index: int, content: str | None, logprobs: Json | None, finish: FinishReason | None
    ) -> str:
        """Return the event that adds content to a chat message; None adds nothing."""
        delta = "{}" if content is None else f'{{"content":{_quoted(content)}}}'
        return self._chunk(index, f'"delta":{delta}', logprobs, finish)

    def of_nothing(self) -> str:
        """Return the event without a choice, which ends a stream with its usage."""
        return f"{self._head}{self._tail}"

    def _chunk(
        self, index: int, added: str, logprobs: Json | None, finish: FinishReason | None
    ) -> str:
        shown = "null" if logprobs is None else _encode(logprobs)
        choice = f'{{"index":{index},{added},"logprobs":{shown},"finish_reason":{_FINISH[finish]}}}'
        return f"{self._head}{choice}{self._tail}"


async def write_chunks(
    write: Write,
    generation: Generation,
    usage: Usage,
    drafts: int,
    options: StreamOptions | None,
    chunks_with: Callable[[Json], Chunks],
    event_of: Callable[[Chunks, Delta], str],
    first: Sequence[bytes] = (),
) -> None:
    """Write the events of a generation's pieces, those that came together at once, and usage if the
    client wants it.

    Args:
        write: sends a piece to the client.
        usage: of the prompt; what is generated is added to it.
        drafts: how many choices share a prompt.
        chunks_with: what makes the events of chunks that hold these fields, `usage` or none.
        event_of: the event of one piece.
        first: events that come before all of them.

    Raises:
        ApiError: 500 or 503, a choice ended too early.
    """
    with_usage = options is not None and options.include_usage
    continuous = options is not None and with_usage and options.continuous_usage_stats
    chunks = chunks_with({"usage": None} if with_usage else {})
    with generation:
        for event in first:
            await write(event)
        while deltas := await generation.more():
            events = []
            for delta in deltas:
                usage.completion_tokens += delta.generated
                if continuous:
                    chunks = chunks_with({"usage": usage.json()})
                events.append(event_of(chunks, delta))
            await write("".join(events).encode())
    if with_usage:
        usage.cached_tokens = generation.cached_tokens(drafts)
        await write(chunks_with({"usage": usage.json()}).of_nothing().encode())
