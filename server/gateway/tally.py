"""Counting one answer into the gateway's metrics, from what the client saw.

Queue and prefill time are the upstreams' to tell; what is measured here begins when the request
reached the gateway.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from server.engine.stats import Timeline
from server.metrics import FINISH_REASONS, RequestMetrics


class Tally:
    """One request's tokens and times. Ends exactly once, with `finished` or `ended`."""

    def __init__(self, metrics: RequestMetrics, variant: str) -> None:
        self._metrics = metrics
        self._variant = variant
        self._arrived = time.monotonic()
        self._first: dict[int, float] = {}
        self._latest: dict[int, float] = {}
        self._reasons: dict[int, str] = {}
        self._usage: Mapping[str, Any] = {}

    def event(self, data: Mapping[str, Any]) -> None:
        """Take an event of a stream that bears tokens."""
        now = time.monotonic()
        for choice in data["choices"]:
            index = int(choice.get("index") or 0)
            if index in self._latest:
                self._metrics.token_emitted(self._variant, now - self._latest[index])
            self._first.setdefault(index, now)
            self._latest[index] = now
            self.choice(choice)

    def choice(self, choice: Mapping[str, Any]) -> None:
        """Take what a choice says of its end."""
        if (reason := choice.get("finish_reason")) is not None:
            known = reason in FINISH_REASONS
            self._reasons[int(choice.get("index") or 0)] = reason if known else "stop"

    def usage(self, usage: Mapping[str, Any]) -> None:
        """Take the token counts of the whole request."""
        self._usage = usage

    def ended(self, reason: str) -> None:
        """Count every choice; those that did not end by themselves ended for `reason`."""
        choices = sorted(self._first.keys() | self._reasons.keys()) or [0]
        now = time.monotonic()
        for index in choices:
            self._metrics.finished(
                self._variant,
                self._reasons.get(index, reason),
                self._share("prompt_tokens", len(choices), index),
                self._share("completion_tokens", len(choices), index),
                Timeline(self._arrived, None, self._first.get(index), now),
            )

    def _share(self, key: str, choices: int, index: int) -> int:
        """Return a choice's part of a count that upstreams give for all choices together."""
        total = int(self._usage.get(key) or 0)
        return total // choices + (index < total % choices)
