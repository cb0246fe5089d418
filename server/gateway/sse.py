"""Server-sent events from an upstream's bytes, each as soon as it is complete."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

DONE = b"[DONE]"
_MAX_EVENT = 16 << 20


class MalformedStreamError(Exception):
    """An upstream sent what is no event stream of JSON objects."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its data as it came, and as JSON."""

    raw: bytes
    data: dict[str, Any]

    @property
    def bears_tokens(self) -> bool:
        """Whether it shows the client anything generated, the end of a choice included."""
        return any(_bears_tokens(choice) for choice in self.data.get("choices") or ())


def _bears_tokens(choice: dict[str, Any]) -> bool:
    shown = ("finish_reason", "text", "logprobs", "token_ids")
    if any(choice.get(key) for key in shown):
        return True
    delta = choice.get("delta") or {}
    return any(value for key, value in delta.items() if key != "role")


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[Event | None]:
    """Yield the events of a stream, and None for its regular end.

    Raises:
        MalformedStreamError: what came is not understood.
    """
    rest = b""
    async for chunk in chunks:
        rest += chunk.replace(b"\r\n", b"\n") if b"\r" in chunk else chunk
        *complete, rest = rest.split(b"\n\n")
        if len(rest) > _MAX_EVENT:
            raise MalformedStreamError(f"an event of more than {_MAX_EVENT} bytes")
        for block in complete:
            if raw := _data(block):
                yield None if raw == DONE else _event(raw)


def _data(block: bytes) -> bytes:
    """Return an event's data; comments have none."""
    lines = (line for line in block.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(line[5:].strip() for line in lines)


def _event(raw: bytes) -> Event:
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise MalformedStreamError(f"an event that is not JSON: {raw[:100]!r}") from error
    if not isinstance(data, dict):
        raise MalformedStreamError(f"an event that is not an object: {raw[:100]!r}")
    return Event(raw, data)
