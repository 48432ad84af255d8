"""Save a patched model and load it again: its library's own checkpoint folder, with `evopatch.json` beside it."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from torch import nn

from ..config import EvoConfig
from ..errors import CheckpointError, ConfigError
from ..version import VERSION
from .apply import apply
from .handle import Patched

FILE_NAME = "evopatch.json"
FORMAT = 1
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


class _Library(Protocol):
    """What the module `evopatch_<library>.checkpoint` offers."""

    def owns(self, model: nn.Module) -> bool: ...

    def save(self, model: nn.Module, folder: Path) -> None: ...

    def load(self, folder: Path, **kwargs: Any) -> nn.Module: ...


_LIBRARIES = {"transformers": "evopatch_transformers.checkpoint", "timm": "evopatch_timm.checkpoint"}


def save_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a patched model to a folder.

    The folder is also a normal checkpoint of the unpatched model: `from_pretrained(path)` reads it for transformers,
    `timm.create_model("local-dir:<path>", pretrained=True)` for timm. Files are written under temporary names and
    renamed, `evopatch.json` last.

    Args:
        model: A patched model of transformers, or one that `timm.create_model` made.
        path: The folder; made if missing, files of the same names are replaced.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        CheckpointError: If the model is of neither library, or can't be built again from what the folder would hold.
    """
    hosts = {name: config.to_dict() for name, config in Patched(model).configs.items()}
    name, library = _library_of(model)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: expected a folder to save to")
    folder.mkdir(parents=True, exist_ok=True)
    written = {"format": FORMAT, "evopatch": VERSION, "library": name, "hosts": hosts}
    with tempfile.TemporaryDirectory(prefix=".evopatch-", dir=folder) as temporary:
        library.save(model, Path(temporary))
        names = sorted(file.name for file in Path(temporary).iterdir())
        for file_name in names:
            os.replace(Path(temporary, file_name), folder / file_name)
        # Of an earlier model in more or fewer files: libraries would read them instead.
        for stale in (file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.name not in names):
            stale.unlink()
        last = Path(temporary, FILE_NAME)
        last.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        os.replace(last, folder / FILE_NAME)


def load_pretrained(path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Build the model that `save_pretrained` wrote, load its weights and patch it as it was.

    Args:
        path: The folder, or a repository `owner/name` on the Hugging Face hub that holds the same files.
        **kwargs: For transformers' `from_pretrained` (`dtype`, `device_map`, `attn_implementation` ...) or
            `timm.create_model`.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: If `evopatch.json` is missing, damaged, of something else, or of a newer format, or if its
            hosts aren't in the model.
    """
    if Path(path).is_file():
        raise CheckpointError(f"{path} is a file: expected a folder written by evopatch.save_pretrained")
    folder = Path(path) if Path(path).is_dir() else _download(str(path))
    file = folder / FILE_NAME
    name, hosts = _read(file)
    library = cast(_Library, importlib.import_module(_LIBRARIES[name]))
    model = library.load(folder, **kwargs).eval()
    parts = dict(model.named_modules())
    if missing := [host for host in hosts if host not in parts]:
        raise CheckpointError(f"{file}: no module named {missing} in the {type(model).__name__} of this folder")
    for host, config in hosts.items():
        apply(parts[host], config=config)
    return model


def _library_of(model: nn.Module) -> tuple[str, _Library]:
    for name, target in _LIBRARIES.items():
        if name in sys.modules:
            library = cast(_Library, importlib.import_module(target))
            if library.owns(model):
                return name, library
    raise CheckpointError(
        f"{type(model).__name__} ({type(model).__module__}): expected a model of transformers (a PreTrainedModel) or "
        "one made by timm.create_model. Save others with torch.save(model.state_dict(), ...), whose keys are "
        "unpatched, and use evopatch.apply after loading"
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
