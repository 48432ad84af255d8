"""With what a patched model was made, so that a pickle of it can say so where something else reads it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..rewrite.classes import host_class
from ..version import VERSION


class Versions:
    """Goes into a patched host's pickle, before anything that another version may have in another place.

    Args:
        made_with: By name of the package.
    """

    def __init__(self, made_with: Mapping[str, str]) -> None:
        self.made_with = dict(made_with)

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self.made_with,)


def versions_of(host: nn.Module) -> Versions:
    """Of this package, and of the libraries that a host's class and its bases are from, torch's left out."""
    packages = {cls.__module__.partition(".")[0] for cls in host_class(host).__mro__} - {"builtins", "torch", "typing"}
    found = {name: _version(name) for name in sorted(packages)}
    return Versions({"evopatch": VERSION} | {name: version for name, version in found.items() if version is not None})


def restored(made_with: dict[str, str]) -> Versions:
    """What unpickling calls first.

    Warns where the library is another version: its modules may have other attributes now.

    Raises:
        CheckpointError: If this package is another version, whose pickles have another layout.
    """
    here = {name: VERSION if name == "evopatch" else _version(name) for name in made_with}
    if here != made_with:
        text = (
            f"this patched model was pickled with {_listed(made_with)}, and is read with {_listed(here)}. Pickles are "
            "for the versions that wrote them: save the model there with evopatch.save_pretrained, or pickle it after "
            "evopatch.remove"
        )
        if here["evopatch"] != made_with["evopatch"]:
            raise CheckpointError(text)
        warnings.warn(text, stacklevel=2)
    return Versions(made_with)


def _version(package: str) -> str | None:
    try:  # a pickle names classes in it next
        version = getattr(importlib.import_module(package), "__version__", None)
    except ImportError:
        return "missing"
    return version if isinstance(version, str) else None


def _listed(versions: Mapping[str, str | None]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())
