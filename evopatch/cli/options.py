"""Options that commands share, and how their values are read."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Precision(str, Enum):
    """The model's floating-point type."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        values = read_toml(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} can't be read as TOML: {error}") from None
    options = {_named(parameter): parameter for parameter in ctx.command.params}
    known = sorted(name for name in options if name not in ("config", "help"))
    if unknown := sorted(set(values) - set(known)):
        raise typer.BadParameter(f"{path} has the unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
    ctx.default_map = dict(ctx.default_map or {}) | _strings(values, options)
    return path


def _named(parameter: Any) -> str:
    """What a file calls an option: as the command line does, with underscores."""
    long = next((option[2:] for option in parameter.opts if option.startswith("--")), None)
    return str(parameter.name) if long is None else long.replace("-", "_")


def _strings(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    # As if typed on the command line, so that every value is checked and converted like one.
    def text(value: Any) -> Any:
        return value if isinstance(value, bool) else str(value)

    found: dict[str, Any] = {}
    for name, value in values.items():
        key, repeated = options[name].name, getattr(options[name], "multiple", False)
        if isinstance(value, list):
            found[key] = [text(v) for v in value] if repeated else ",".join(map(str, value))
        else:
            found[key] = [text(value)] if repeated else text(value)
    return found


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A TOML file with any of these options, named with underscores. What is given on the command line wins.",
        is_eager=True,
        callback=_read_config,
    ),
]
Model = Annotated[
    str,
    typer.Option(help="A timm name, such as deit_tiny_patch16_224, or a transformers model: a folder, or a hub name."),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights in timm's layout. Default: timm's pretrained ones.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes of the checkpoint's head.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Input size in pixels. Default: the model's.")]


def place(model: nn.Module, device: str, precision: Precision) -> nn.Module:
    """A model on a device, in a type.

    Raises:
        ConfigError: If there is no such device here.
    """
    import torch

    try:
        return model.to(torch.device(device), getattr(torch, precision.value))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device '{device}': {str(error).splitlines()[0]}") from error


def check_folder_of(file: Path | None, option: str, is_folder: bool = False) -> None:
    """Before the work that the file is for.

    Args:
        file: To be written.
        option: That it is of.
        is_folder: Whether it is one that goes by the name of a file, to be replaced if it is there.

    Raises:
        DataError: If it can't be written.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise DataError(f"{file.parent}: no such folder for the results; create it or give another {option}")
    if file.is_dir() and not is_folder:
        raise DataError(f"{option} {file} is a folder: expected a file; give a name in it")
    if file.exists() and not is_folder:
        if not os.access(file, os.W_OK):
            raise DataError(f"{option} {file} may not be written: change its permissions or give another {option}")
        return  # it may be /dev/stdout, in whose folder nothing can be made
    _check_writable(file.parent, f"{option} {file}")


def check_folder(folder: Path, option: str) -> None:
    """Before the work whose results it is for.

    Raises:
        DataError: If it is a file, or can't be made or written to.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        of = "" if there == folder else f": {there}"
        raise DataError(f"{option} {folder}{of} is a file: expected a folder")
    _check_writable(there, f"{option} {folder}")


def _check_writable(folder: Path, what: str) -> None:
    try:
        # Permissions don't tell: of root all are, and file systems have their own mind.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"{what} can't be written: nothing can be made in {folder} ({error.strerror}). Give another place"
        ) from error


def check_picture(file: Path | None, option: str) -> None:
    """Before the work that it shows. Needs matplotlib.

    Raises:
        DataError: If its folder isn't there.
        ConfigError: If its ending is none of a format that pictures can have.
    """
    if file is None:
        return
    from matplotlib.figure import Figure

    check_folder_of(file, option)
    known = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix.lower().removeprefix(".") not in known:
        raise ConfigError(f"{option} {file}: expected the ending of a picture, one of .{', .'.join(known)}")


def read_toml(path: Path) -> dict[str, Any]:
    """
    Raises:
        OSError: If the file can't be read.
        ValueError: If it is no TOML.
    """
    return tomllib.loads(path.read_text())


def parse_ratios(text: str) -> float | tuple[float, ...]:
    """`0.5`, or one per run as in `0.6,0.35`."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"'{text}': expected a number, or numbers separated by commas") from None
    return values[0] if len(values) == 1 else values


def parse_start(text: str) -> int | float:
    """A block, or below 1 a share of the depth."""
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}': expected a block's number, or a share of the depth") from None


def parse_channels(text: str | None, option: str, positive: bool = False) -> tuple[float, ...] | None:
    """One number for all channels, or three; of an option."""
    if text is None:
        return None
    value = parse_ratios(text)
    values = value if isinstance(value, tuple) else (value,) * 3
    if len(values) != 3:
        raise typer.BadParameter(f"{option} '{text}': expected one number or three")
    if not all(math.isfinite(number) and (number > 0 or not positive) for number in values):
        raise typer.BadParameter(f"{option} '{text}': expected {'numbers above 0' if positive else 'finite numbers'}")
    return values


def spread_rows(total: int, wanted: int) -> list[int]:
    """So many of the numbers below `total`, all of them at most, evenly spread: neighbours may be of one class."""
    number = min(wanted, total)
    return [round(place * (total - 1) / max(1, number - 1)) for place in range(number)]


def parse_rows(text: str, total: int, option: str) -> range:
    """`FIRST:LAST`, either of them may be left out; of an option.

    Raises:
        DataError: If there are no such rows.
    """
    first, separator, last = text.partition(":")
    if not separator:
        raise typer.BadParameter(f"rows {text}: expected FIRST:LAST, either of them may be left out")
    begin, end = whole_numbers([first or "0", last or str(total)], text)
    if not (rows := range(total)[begin:end]):
        raise DataError(f"{option} {text}: none of the images, which are {total}, 0 to {total - 1}")
    return rows


def whole_numbers(parts: list[str], text: str) -> list[int]:
    """The parts of an option's text as numbers."""
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise typer.BadParameter(f"'{text}': expected whole numbers") from None
