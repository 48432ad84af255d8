"""Files that are whole or not there, whenever a program is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CheckpointError

_TEMPORARY = ".evopatch-"
_STALE = 24 * 60 * 60
"""Seconds since a name in a temporary folder changed, after which no living process still writes there."""


def make_folder(path: str | os.PathLike[str], purpose: str) -> Path:
    """A folder, made with those above it if it isn't there.

    Args:
        path: Where.
        purpose: For the error: "to save to".

    Raises:
        CheckpointError: If it is a file, or can't be made.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: expected a folder {purpose}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} can't be made ({error.strerror}): expected a folder {purpose}") from error
    return folder


@contextmanager
def temporary_in(folder: Path) -> Iterator[Path]:
    """A temporary folder in another one, and so on its disk: what is in it can be renamed to its place.

    Those that processes left there that were killed go, a day after.
    """
    for left in folder.glob(f"{_TEMPORARY}{'?' * 8}"):  # as tempfile names them
        with suppress(OSError):  # another process removes it, too, or it isn't ours to remove
            if left.is_dir() and not left.is_symlink() and time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temporary:
        yield Path(temporary)


def make_readable(file: Path) -> None:
    """Give a file the mode of any other new one: safetensors makes its own for their owner only."""
    other = file.with_name(f".{file.name}.mode")  # asking for the umask would change it for all threads
    other.touch()
    file.chmod(other.stat().st_mode)
    other.unlink()


def publish(temporary: Path, path: Path) -> None:
    """Give a file, or a folder whose files were flushed, its own name once it is on the disk."""
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
