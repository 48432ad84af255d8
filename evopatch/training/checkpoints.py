"""Checkpoints of a run that survive being killed at any moment."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..durable import flush, make_folder, make_readable, publish
from ..errors import CheckpointError, ConfigError
from ..patching.weights import foreign_code, weights_only

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "checkpoints"
_MANIFEST = "manifest.json"
_INITIAL = "initial.pt"
_PREFIX = "step-"
_UNFINISHED = "unfinished-"
_PICKLED = (".bin", ".pkl", ".pt")
_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)


def write_initial(output: Path, model: nn.Module) -> None:
    """The weights that a run begins with: what it is compared with, and maybe taught by, when it is resumed.

    Raises:
        CheckpointError: If the folder can't be made.
    """
    folder = make_folder(output / FOLDER, "for the run")
    temporary = folder / f"{_UNFINISHED}{_INITIAL}"
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, temporary)
    publish(temporary, folder / _INITIAL)


def load_initial(output: Path, model: nn.Module) -> None:
    """Give a model the weights that the run in a folder began with.

    Raises:
        CheckpointError: If they are missing or damaged.
        ConfigError: If they don't fit the model, which has its own then.
    """
    path = output / FOLDER / _INITIAL
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}, the weights that the run began with, can't be read: {_first_line(error)}{foreign_code(path)}"
        ) from error
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in state.items()}:
        raise ConfigError(f"{path} is of another model than this {type(model).__name__}: resume with the same one")
    model.load_state_dict(state)


def write(output: Path, step: int, accelerator: Accelerator, settings: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint: under a temporary name, flushed to the disk, then renamed; older ones go after that.

    Args:
        output: The run's folder, the same for all processes.
        step: Optimizer steps done.
        accelerator: Whose state to save; called by all of its processes.
        settings: What has to be the same when the run is resumed; plain values.
        keep: How many of the newest to keep, this one included.
    """
    folder = output / FOLDER
    target, temporary = folder / f"{_PREFIX}{step:09d}", folder / f"{_UNFINISHED}{step:09d}"
    if accelerator.is_main_process:
        for left in folder.glob(f"{_UNFINISHED}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(temporary, target, settings)
        # Later steps are damaged ones, which a resumed run went back from.
        known = steps(output)
        before = [known_step for known_step in known if known_step <= step]
        for old in [*before[:-keep], *known[len(before) :]]:
            shutil.rmtree(folder / f"{_PREFIX}{old:09d}")
    accelerator.wait_for_everyone()


def _finish(temporary: Path, target: Path, settings: Mapping[str, Any]) -> None:
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        make_readable(path)
    digests = {str(path.relative_to(temporary)): _digest(path) for path in files}
    manifest = {"settings": dict(settings), "files": digests}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*files, temporary / _MANIFEST]:
        flush(path)
    shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step, from before a resume
    publish(temporary, target)


def restore(path: Path, accelerator: Accelerator) -> None:
    """Give an accelerator, and what it was told to save, the state that a whole checkpoint holds.

    Raises:
        CheckpointError: If a file in it holds more than tensors and plain values, none of which is run then.
    """
    from accelerate.utils import load

    with weights_only():
        # accelerate goes on without random states that it can't read.
        for file in sorted(file for ending in _PICKLED for file in path.glob(f"*{ending}")):
            try:
                load(str(file), map_location="cpu", mmap=True)
            except _UNREADABLE as error:
                raise CheckpointError(f"{file} can't be read: {_first_line(error)}{foreign_code(file)}") from error
        accelerator.load_state(str(path))


def steps(output: Path) -> list[int]:
    """The steps that there are checkpoints of, ascending. Folders of other names beside them aren't touched."""
    names = (path.name.removeprefix(_PREFIX) for path in (output / FOLDER).glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in names if re.fullmatch(r"\d{9,}", name))


def weights(output: Path) -> dict[int, Path]:
    """Files with the weights of every checkpoint by step: the model's, beside the heads that only training needs."""
    files = {step: output / FOLDER / f"{_PREFIX}{step:09d}" / "model.safetensors" for step in steps(output)}
    return {step: file for step, file in files.items() if file.is_file()}


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


def settings_of(path: Path) -> dict[str, Any]:
    """What a whole checkpoint was written with."""
    settings: dict[str, Any] = json.loads((path / _MANIFEST).read_text())["settings"]
    return settings


def _damage(folder: Path) -> str | None:
    try:
        manifest: dict[str, str] = json.loads((folder / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"the checkpoint {folder} is damaged: its {_MANIFEST} can't be read ({error})"
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"the checkpoint {folder} is damaged: {name} is missing"
        if _digest(path) != digest:
            return f"the checkpoint {folder} is damaged: {name} is truncated or changed"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
