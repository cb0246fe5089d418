"""What several tests share: one loaded model, one running server, one cache for both, and native
functions that are compiled once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# The converted model and plans stay between runs, apart from the user's own cache.
os.environ.setdefault(
    "ATTNDROP_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "test-cache")
)

import torch

# Without a GPU, Triton's kernels run in its interpreter, which is chosen when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from pruning.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from server.engine.native import native_functions
from tests.live import LiveServer, serve

HALF = "15"
"""Layers dropped by `pruned` on the live server: half of the embedded model's 30."""


@pytest.fixture(scope="session")
def base() -> BaseModel:
    """The embedded model, in this process, in float32."""
    return load_base_model(EMBEDDED_MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def live(run_folder: Path) -> Iterator[LiveServer]:
    """A server on the embedded model: full, pruned (15 of 30 layers dropped) and light (4)."""
    with ExitStack() as stack:
        with in_turn(run_folder / "plan.lock"):  # the first computes it, a minute's work
            options = ["--drop", HALF, "--variant", "light=4", "--dtype", "float32"]
            server = stack.enter_context(serve(options))
        yield server


@pytest.fixture(scope="session")
def native_folder(run_folder: Path) -> Path:
    """A folder with native functions, which take ten seconds to compile."""
    folder = run_folder / "native"
    with in_turn(run_folder / "native.lock"):
        native_functions(folder)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def in_turn(lock: Path) -> Iterator[None]:
    """Let one worker at a time make what it leaves to the others."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data for measuring, which is not part of the project."""
    folder = os.environ.get("ATTNDROP_SHARED_DATA")
    if not folder:
        pytest.skip("ATTNDROP_SHARED_DATA does not name a folder of real data")
    return Path(folder)
