"""Native functions, compiled once for all tests that call them, and a quicker interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from server.engine.native import NativeFunctions, native_functions

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    from tests.engine.interpreter import leave_out_what_changes_nothing

    leave_out_what_changes_nothing()


@pytest.fixture(scope="session")
def native_of_this_processor(native_folder: Path) -> NativeFunctions:
    functions = native_functions(native_folder)
    assert functions is not None
    return functions


@pytest.fixture(scope="session")
def native_of_avx512_alone(native_folder: Path) -> NativeFunctions:
    """The functions as a processor has them that multiplies neither bfloat16 numbers nor bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.engine.native._optional_flags", list)
        functions = native_functions(native_folder)
    assert functions is not None
    return functions
