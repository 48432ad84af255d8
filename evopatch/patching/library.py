"""What saving a model asks of its library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn


class Origin(NamedTuple):
    """Where a model comes from, as far as its own configuration says."""

    base_model: str | None
    """`owner/name` on the Hugging Face hub."""
    input_size: tuple[int, int, int] | None
    """`(channels, height, width)` in pixels."""
    stock: str
    """Code that loads the unpatched model from a folder named `folder`."""


class Library(Protocol):
    """What the module `evopatch_<library>.checkpoint` offers."""

    def owns(self, model: nn.Module) -> bool:
        """Whether this library can save the model."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a checkpoint of the unpatched model."""

    def preprocessing(self, model: nn.Module) -> list[Path]:
        """Files on this machine that say how images become its input, where the library doesn't save that with it."""

    def save_processor(self, processor: Any, folder: Path) -> None:
        """Write what makes the model's input."""

    def load(self, folder: Path, **kwargs: Any) -> nn.Module:
        """The unpatched model."""

    def origin(self, model: nn.Module) -> Origin:
        """What a model card says of the model."""


def hub_name(name: object) -> str | None:
    """A name if it is one on the hub, `owner/name`; None for a path, or anything else."""
    text = str(name)
    return text if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) and not Path(text).exists() else None
