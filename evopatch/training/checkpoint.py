"""Checkpoints of a run that survive being killed at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FOLDER = "checkpoints"
KEPT = 2
"""The newest, and the one before it, which is used should the newest turn out to be damaged."""
_MANIFEST = "manifest.json"
_PREFIX = "step-"
_UNFINISHED = "unfinished-"


def write(output: Path, step: int, accelerator: Any) -> None:
    """Write a checkpoint: under a temporary name, flushed to the disk, then renamed; older ones go after that.

    Args:
        output: The run's folder, the same for all processes.
        step: Optimizer steps done.
        accelerator: Whose state to save; called by all of its processes.
    """
    folder = output / FOLDER
    target, temporary = folder / f"{_PREFIX}{step:09d}", folder / f"{_UNFINISHED}{step:09d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(temporary, target)
        for old in steps(output)[:-KEPT]:
            shutil.rmtree(folder / f"{_PREFIX}{old:09d}")
    accelerator.wait_for_everyone()


def _finish(temporary: Path, target: Path) -> None:
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(temporary)): _digest(path) for path in files}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*files, temporary / _MANIFEST, temporary]:
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step, from before a resume
    os.replace(temporary, target)
    _flush(target.parent)


def steps(output: Path) -> list[int]:
    """The steps that there are checkpoints of, ascending."""
    return sorted(int(path.name[len(_PREFIX) :]) for path in (output / FOLDER).glob(f"{_PREFIX}*"))


def latest(output: Path) -> Path | None:
    """The newest checkpoint that is whole; None where no checkpoint was written yet. Warns of every damaged one.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged.
    """
    damages: list[str] = []
    for step in reversed(steps(output)):
        path = output / FOLDER / f"{_PREFIX}{step:09d}"
        damage = _damage(path)
        if damage is None:
            for text in damages:
                warnings.warn(f"{text}; {path} is used instead", stacklevel=2)
            return path
        damages.append(damage)
    if damages:
        raise CheckpointError(f"no checkpoint in {output} is whole: {'; '.join(damages)}")
    return None


def _damage(folder: Path) -> str | None:
    try:
        manifest: dict[str, str] = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"the checkpoint {folder} is damaged: its {_MANIFEST} can't be read ({error})"
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"the checkpoint {folder} is damaged: {name} is missing"
        if _digest(path) != digest:
            return f"the checkpoint {folder} is damaged: {name} is truncated or changed"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
