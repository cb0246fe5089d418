"""Kernels that are launched while the one before them ends (programmatic dependent launch).

Between two kernels of a recorded step a device is idle for about a microsecond, and there are some
three hundred. A kernel launched early has its programs in place by then: they wait, in
`wait_for_previous`, until all that was launched before has stored its results. The kernel before
says when that may begin, in `let_next_start`; one that says nothing lets it begin at its end.

Two rules keep this safe, in kernels here and in what the compiler makes (compiling.py):

- nothing that the kernel before wrote is read before the wait, and nothing is stored;
- no kernel lets the next one start before its own wait is over.

The second makes the first enough: whoever starts knows that all kernels but the last are done, so
the compiler's read what those wrote as soon as they start. Those here read only what no kernel of
the step writes. A kernel lets the next one start late: programs that wait take room from those that
work.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

_HOPPER = 9
"""The first compute capability whose kernels can wait for each other."""


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@lru_cache
def launches_early(device: torch.device) -> bool:
    """Return whether a device's kernels can be launched early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _HOPPER
