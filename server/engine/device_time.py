"""How long the device works and waits, by timestamps it takes itself.

    device   [ step n ]......[ step n + 1 ]      [ step n + 2 ]
                      idle: the host was late    not counted: there was no work in between

A step begins with its first kernel; inputs are on their way before. One that runs kernel by kernel
counts as busy while the device waits for the next of them. On a CPU, which computes while the host
waits, nothing is counted.
"""

from __future__ import annotations

import torch


class DeviceTime:
    """Seconds the device spent in steps and between steps that followed each other."""

    def __init__(self) -> None:
        self.busy = 0.0
        self.idle = 0.0

    def add(self, step: Span) -> None:
        """Count a step that has ended."""
        assert step.end is not None, "the step was not marked as ended"
        self.busy += step.start.elapsed_time(step.end) / 1e3
        if step.before is not None and step.before.end is not None:
            self.idle += max(0.0, step.before.end.elapsed_time(step.start) / 1e3)
        step.before = None  # counted; keep no chain of steps


class Span:
    """One step between two marks in the device's queue."""

    def __init__(self, before: Span | None) -> None:
        """`before` is the step after which there was work all the time."""
        self.before = before
        self.start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.end: torch.cuda.Event | None = None
        self.start.record()

    def close(self) -> None:
        """Mark the end: what was launched until now belongs to the step."""
        self.end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.end.record()

    def wait(self) -> None:
        """Wait until the device has got to the end."""
        assert self.end is not None, "the step was not marked as ended"
        self.end.synchronize()
