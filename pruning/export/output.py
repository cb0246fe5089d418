"""Output that is there whole or not at all.

It is made in a hidden folder beside its place, and renamed when it is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pruning.export.errors import ExportError


def check_free(out: Path) -> None:
    """Raise ExportError if something stands where the output is to be."""
    if out.exists():
        raise ExportError(f"{out} exists; remove it or choose another name")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill that becomes `out` if the block ends well, and is removed if not.

    Raises:
        ExportError: `out` exists, or cannot be written.
    """
    with _work_folder(out) as work:
        yield work
        _settle(work)
        work.rename(out)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """Yield the path of a file to write that becomes `out` if the block ends well.

    Raises:
        ExportError: `out` exists, or cannot be written.
    """
    with _work_folder(out) as work:
        yield work / out.name
        _settle(work)
        (work / out.name).rename(out)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    check_free(out)
    work: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        yield work
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _settle(work: Path) -> None:
    """Put everything on the disk, with the permissions that new files have."""
    umask = os.umask(0)
    os.umask(umask)
    work.chmod(0o777 & ~umask)
    for path in work.iterdir():
        path.chmod(0o666 & ~umask)
        with path.open("rb") as file:
            os.fsync(file.fileno())
