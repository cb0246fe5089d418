"""What Triton's interpreter does otherwise than a GPU, put right for tests."""

from __future__ import annotations

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
