"""What there is to know of a file format."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from ..errors import ConfigError, DataError
from .conversion import Conversion

Run: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]
"""Images `(B, C, height, width)` through a file by its own runtime, to what the model returns."""


@dataclass(frozen=True)
class Form:
    """One file format, written and run by its own library."""

    name: str
    ending: str
    packages: tuple[str, ...]
    """To be installed, by the names that they are imported by; pip has the same."""
    write: Callable[[Conversion, Path], None]
    """A conversion to a file, which may get others beside it."""
    open: Callable[[Path], Run] | None
    """None where the runtime isn't to be had on the machines that write the file."""
    any_batch: bool = True
    """Whether one file can take batches of any size."""
    any_size: bool = True
    """Whether one file can take images of any size."""
    quantised_by: tuple[str, ...] | None = None
    """What else is to be installed for a file in int8; None where evopatch writes none."""
    quantised_by_images: bool = True
    """Whether that library looks at images to quantise."""
    beside: tuple[str, ...] = ()
    """What the file may get beside it: names with its own as `{name}`, and without the ending as `{stem}`."""
    run_with: str | None = None
    """Setting of the runtime that the file is verified with, where others give something else."""
    is_package: bool = False
    """Whether what it writes is a folder, which looks like a file where it is used."""
    own_half: bool = False
    """Whether its library makes the file's values float16 by itself and leaves the input float32."""

    def check_target(self, path: Path) -> None:
        """
        Raises:
            ConfigError: If the path hasn't the format's ending.
            DataError: If it can't be written, or something of another kind is in the way of one of the files.
        """
        if path.suffix != self.ending:
            raise ConfigError(f"{path}: expected the ending {self.ending} of format {self.name}")
        if not path.parent.is_dir():
            raise DataError(f"{path.parent}: no such folder for {path.name}; create it")
        if self.is_package and os.path.lexists(path) and not is_package(path):
            raise DataError(f"{path} is no package of Core ML: expected one, or nothing. Move it, or give another path")
        beside = [path.with_name(name.format(name=path.name, stem=path.stem)) for name in self.beside]
        for target in [*([] if self.is_package else [path]), *beside]:
            if target.is_dir():
                raise DataError(
                    f"{target} is a folder: expected a file, or nothing, where format {self.name} writes one. Move it, "
                    "or give another path"
                )

    def check(self, any_batch: bool, any_size: bool, int8: bool, half: bool) -> None:
        """
        Raises:
            ConfigError: If the format can't hold such a model.
            ModuleNotFoundError: If a package is missing; says what to install.
        """
        if any_batch and not self.any_batch:
            raise ConfigError(f"format {self.name} takes batches of one size: give it, as in batch_size=1 (--batch 1)")
        if any_size and not self.any_size:
            raise ConfigError(f"format {self.name} takes images of one size: leave any_size (--image-size dynamic) out")
        if int8 and self.quantised_by is None:
            raise ConfigError(f"format {self.name} isn't written in int8 by evopatch: expected onnx, openvino or pt2")
        if int8 and half:
            raise ConfigError("int8 and half: expected one of them; what isn't int8 stays float32")
        needed = (*self.packages, *((self.quantised_by or ()) if int8 else ()))
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            raise ModuleNotFoundError(
                f"format {self.name}{' in int8' if int8 else ''} needs {', '.join(missing)}: pip install "
                f"{' '.join(missing)}, or 'evopatch[export]' for all formats"
            )


def is_package(path: Path) -> bool:
    """Whether it is a folder that Core ML's tools wrote."""
    return path.is_dir() and not path.is_symlink() and (path / "Manifest.json").is_file()
