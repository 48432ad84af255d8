"""Save a patched model and load it again: its library's own checkpoint folder, `evopatch.json` and a card beside it."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from ..config import EvoConfig
from ..durable import make_folder, make_readable, publish, temporary_in
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..patching.apply import apply_again
from ..patching.handle import Patched
from ..patching.learning import learned, set_learned
from ..patching.library import Library
from ..version import VERSION
from . import card

Model = TypeVar("Model", bound=nn.Module)
FILE_NAME = "evopatch.json"
LEARNED_FILE = "evopatch.safetensors"
"""What blocks learned from images, where they did."""
FORMAT = 1
_UNFINISHED = "unfinished"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LIBRARIES = {"transformers": "evopatch_transformers.checkpoint", "timm": "evopatch_timm.checkpoint"}


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], processor: Any = None) -> None:
    """Write a patched model to a folder.

    The folder is also a normal checkpoint of the unpatched model: `from_pretrained(path)` reads it for transformers,
    `timm.create_model("local-dir:<path>", pretrained=True)` for timm. Files are written under temporary names and
    renamed once all are. While they are, `evopatch.json` says that the folder is unfinished, so that a save which was
    stopped half-way is never loaded as a model of two. A model card, `README.md`, is written where there is none.

    Args:
        model: A patched model of transformers, or one that `timm.create_model` made.
        path: The folder; made if missing, files of the same names are replaced. Of the other files in it, those go
            that an `evopatch.json` or a `model.safetensors.index.json` in it lists as their own.
        processor: Of a transformers model: what makes its input, to be saved with it. None: the files of the one that
            lies where the model was loaded from, if that is on this machine, unless the folder has others already.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If it was changed since, so that patching it anew would give another model.
        CheckpointError: If the model is of neither library, can't be built again from what the folder would hold, or
            another model's weights in the folder would be read in place of this one's.
    """
    patched = Patched(model)
    patched.check_as_applied()
    hosts = {name: config.to_dict() for name, config in patched.configs.items()}
    name, library = _library_of(patched.model)
    folder = make_folder(path, "to save to")
    with temporary_in(folder) as temporary:
        library.save(patched.model, temporary)
        if processor is None:
            _copy(library.preprocessing(patched.model), folder, temporary)
        else:
            library.save_processor(processor, temporary)
        tensors = learned(patched.model)
        if tensors:
            from safetensors.torch import save_file  # which both libraries bring

            save_file(tensors, temporary / LEARNED_FILE)
        files = sorted(file.name for file in temporary.iterdir())
        stale = _listed(folder) - set(files)
        _refuse_other_weights(folder, files, stale)
        if not (folder / card.FILE_NAME).exists():
            (temporary / card.FILE_NAME).write_text(card.card(patched, name, library.origin(patched.model)))
        about = {"format": FORMAT, "evopatch": VERSION}
        _describe(folder, temporary, {**about, _UNFINISHED: True, "files": sorted(stale.union(files))})
        for file in sorted(temporary.iterdir()):
            if file.is_file():
                make_readable(file)
            publish(file, folder / file.name)
        for file_name in stale:  # libraries may read them instead
            (folder / file_name).unlink()
        written = {**about, "library": name, "hosts": hosts, "files": files}
        if tensors:
            written["learned"] = sorted(tensors)
        _describe(folder, temporary, written)


def _describe(folder: Path, temporary: Path, values: Mapping[str, Any]) -> None:
    file = temporary / FILE_NAME
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    publish(file, folder / FILE_NAME)


def _copy(files: list[Path], folder: Path, temporary: Path) -> None:
    listed = _listed(folder)
    for file in files:
        if file.name in listed or not (folder / file.name).exists():
            shutil.copyfile(file, temporary / file.name)


def _listed(folder: Path) -> set[str]:
    """Names of the files in a folder that are of an earlier checkpoint, by its own account."""
    names = _entries(folder / FILE_NAME, "files")
    if shards := _entries(folder / _INDEX, "weight_map"):
        names |= {_INDEX, *shards}
    # Nothing outside of the folder, whatever a list says; a card may have been edited since.
    names = {name for name in names if name == Path(name).name} - {FILE_NAME, card.FILE_NAME}
    return {name for name in names if (folder / name).is_file()}


def _entries(file: Path, key: str) -> set[str]:
    try:
        values = json.loads(file.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    listed = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return {name for name in listed if isinstance(name, str)}


def _refuse_other_weights(folder: Path, files: list[str], stale: set[str]) -> None:
    if _WEIGHTS not in files and _WEIGHTS not in stale and (folder / _WEIGHTS).exists():
        raise CheckpointError(
            f"{folder / _WEIGHTS} is of another checkpoint, and would be read in place of the shards that this model "
            "is saved in: move it away, or save to another folder"
        )


def load_pretrained(path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Build the model that `save_pretrained` wrote, load its weights and patch it as it was.

    Args:
        path: The folder, or a repository `owner/name` on the Hugging Face hub that holds the same files.
        **kwargs: For transformers' `from_pretrained` (`dtype`, `device_map`, `attn_implementation` ...) or
            `timm.create_model`.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: If `evopatch.json` is missing, damaged, of something else, or of a newer format, if a save to
            the folder isn't finished, or one was made while the model was loaded, or if the model has no such hosts,
            or can't be patched so.
    """
    if Path(path).is_file():
        raise CheckpointError(f"{path} is a file: expected a folder written by evopatch.save_pretrained")
    folder = Path(path) if Path(path).is_dir() else _download(str(path))
    with _unchanged(folder / FILE_NAME):
        name, _ = _read(folder / FILE_NAME)
        library = cast(Library, importlib.import_module(_LIBRARIES[name]))
        return patch_as_saved(library.load(folder, **kwargs).eval(), folder)


@contextmanager
def _unchanged(file: Path) -> Iterator[None]:
    """Refuses what was read from a folder while a save replaced its files: some may be of the former model."""
    before = _identity(file)
    replaced = (
        f"{file.parent} was saved to by another process while its model was loaded, which may be one of two models "
        "then: load it again"
    )
    try:
        yield
    except CheckpointError as error:
        if _identity(file) == before:
            raise
        raise CheckpointError(replaced) from error
    if _identity(file) != before:
        raise CheckpointError(replaced)


def _identity(file: Path) -> tuple[int, int] | None:
    # Not what it says: that may be the same for two models.
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_pretrained`, or a save to it was begun."""
    return (folder / FILE_NAME).is_file()


def patch_as_saved(model: Model, folder: Path) -> Model:
    """Patch a model as the one was that `save_pretrained` wrote, with what its blocks learned.

    Args:
        model: An unpatched one of the same structure.
        folder: Where that one is.

    Raises:
        CheckpointError: As for `load_pretrained`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / FILE_NAME
    _, hosts = _read(file)
    expected = _entries(file, "learned")
    try:
        apply_again(model, hosts)
        tensors = load_file(folder / LEARNED_FILE) if (folder / LEARNED_FILE).exists() else {}
        set_learned(model, tensors)
        if missing := sorted(expected - tensors.keys()):
            raise CheckpointError(
                f"{folder / LEARNED_FILE} holds {len(tensors)} tensors and {file.name} lists {len(expected)} that the "
                f"model learned from images, such as '{missing[0]}': the file is of another model, or was lost. Copy "
                "the whole folder, or save the model again"
            )
        if unlisted := sorted(tensors.keys() - expected):
            raise CheckpointError(
                f"{folder / LEARNED_FILE} holds '{unlisted[0]}', which {file.name} doesn't list as learned: the file "
                "is of another model. Remove it if this one learned nothing, or copy the whole folder again"
            )
        return model
    except (UnsupportedModelError, ConfigError, SafetensorError) as error:
        raise CheckpointError(f"{file} doesn't fit the model in this folder: {error}") from error


def _library_of(model: nn.Module) -> tuple[str, Library]:
    for name, target in _LIBRARIES.items():
        if name in sys.modules:
            library = cast(Library, importlib.import_module(target))
            if library.owns(model):
                return name, library
    raise CheckpointError(
        f"{type(model).__name__} ({type(model).__module__}): expected a model of transformers (a PreTrainedModel) or "
        "one made by timm.create_model. Save others with torch.save(model.state_dict(), ...), whose keys are "
        "those of the unpatched model, and use evopatch.apply after loading; of a PeftModel the adapters by its own "
        "save_pretrained, or the whole after merge_and_unload()"
    )


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"'{repository}': no such folder here, and it couldn't be had from the Hugging Face hub ({reason}). "
            "Expected a folder written by evopatch.save_pretrained, or a repository owner/name"
        ) from error


def _read(file: Path) -> tuple[str, dict[str, EvoConfig]]:
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} holds no {FILE_NAME}: expected a folder written by evopatch.save_pretrained. For an "
            "unpatched checkpoint load the model with its own library and use evopatch.apply"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or no JSON: {error}. Save the model again") from error
    if isinstance(values, Mapping) and values.get(_UNFINISHED):
        raise CheckpointError(
            f"{file.parent} holds an unfinished save: its files may be of two models. Another process is writing them, "
            "or was stopped while it did: load it again when that one is done, or save the model again"
        )
    if not isinstance(values, Mapping) or not {"format", "library", "hosts"} <= set(values):
        raise CheckpointError(f"{file} wasn't written by evopatch: expected the entries format, library and hosts")
    if values["format"] != FORMAT:
        raise CheckpointError(
            f"{file} is of format {values['format']!r}, written by evopatch {values.get('evopatch', '(unknown)')}; "
            f"this is evopatch {VERSION}, which reads format {FORMAT}: upgrade evopatch"
        )
    if values["library"] not in _LIBRARIES or not isinstance(values["hosts"], Mapping) or not values["hosts"]:
        raise CheckpointError(
            f"{file}: library {values['library']!r} with hosts {values['hosts']!r}: expected one of "
            f"{sorted(_LIBRARIES)} and at least one patched host"
        )
    try:
        hosts = {name: EvoConfig.from_dict(config) for name, config in values["hosts"].items()}
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return values["library"], hosts
