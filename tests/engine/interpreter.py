"""What Triton's interpreter does otherwise than a GPU or for nothing, put right for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from server.engine.attention.eight_bits import E4M3


def round_to_nearest_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round float32 to E4M3 as GPUs and torch do.

    Its own conversion loses a carry into the exponent, so that 1.95 becomes 1, and rounds what is
    below 2**-6 to something else.
    """
    otherwise = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return otherwise(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return values.to(E4M3).view(torch.uint8).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def leave_out_what_changes_nothing() -> None:
    """Spare the interpreter what takes half of its time.

    It adds integers once more in 64 bits to find an overflow, which it only tells where it debugs,
    and at each call of a device function it gives all of Triton's language its own meaning again,
    which the first call of that function has done.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    give_meaning: Callable[[Any], Any] = cache(interpreter._patch_lang)

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        give_meaning(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
