"""Native functions, compiled once for all tests that call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.native import NativeFunctions, native_functions


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
