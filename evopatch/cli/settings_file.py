"""The options of a run as a TOML file in its folder, for `--config`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ..errors import CheckpointError, ConfigError
from ..training.differences import differences
from ..training.settings import MAY_DIFFER
from . import options

NAME = "config.toml"
_PLACES = ("model", "checkpoint", "teacher", "teacher_checkpoint", "data", "eval_data", "output")
"""Options that may name a file or a folder."""


def folder_of(ctx: typer.Context, default: Path) -> Path:
    """Where a command's run goes, or is: a run that is resumed by its own settings lies beside them, also where it was
    moved.

    Args:
        ctx: Of the command, with the values of all of its options.
        default: Where no `--output` is given.
    """
    from ..training import checkpoints

    config, output = ctx.params["config"], ctx.params["output"]
    source = ctx.get_parameter_source("output")
    if source is not None and source.name == "COMMANDLINE":
        return Path(output)
    resumed = ctx.params["resume"] and config is not None and config.name == NAME
    if resumed and checkpoints.steps(config.parent):
        return Path(config.parent)
    return default if output is None else Path(output)


def check(folder: Path, ctx: typer.Context) -> None:
    """Whether a command can begin its run in a folder, or go on with the one that is there.

    Args:
        folder: Of the run.
        ctx: Of the command, with the values of all of its options.

    Raises:
        CheckpointError: If there is a run and it isn't to be resumed, or the other way round.
        DataError: If it is a file, or can't be made or written to.
        ConfigError: If the run is resumed with other options than it was begun with.
    """
    from ..training import checkpoints

    options.check_folder(folder, "--output")
    there, resume = bool(checkpoints.steps(folder)), ctx.params["resume"]
    if there and not resume:
        raise CheckpointError(
            f"{folder} holds the checkpoints of a run: give --resume to go on with it, or another --output"
        )
    # A run that was killed before its first checkpoint has its settings there, and begins anew.
    if resume and not there and not (folder / NAME).is_file():
        raise CheckpointError(
            f"--resume: {folder} holds no run to go on with; give the --output of one, or leave it out"
        )
    if there:
        _check(folder / NAME, _plain(folder, ctx))


@contextmanager
def saved(folder: Path, ctx: typer.Context) -> Iterator[None]:
    """Write the options of a command to the folder of the run inside; the folder goes again if that fails before it
    writes anything. Arguments as for `check`."""
    import tomli_w

    from ..training import checkpoints, processes

    # A run that is resumed keeps its own.
    if checkpoints.steps(folder) or not processes.is_main():
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(tomli_w.dumps(_plain(folder, ctx)))
    try:
        yield
    except BaseException:
        if made and [path.name for path in folder.iterdir()] == [NAME]:
            (folder / NAME).unlink()
            folder.rmdir()
        raise


def _plain(folder: Path, ctx: typer.Context) -> dict[str, Any]:
    values = {
        name: value for name, value in ctx.params.items() if value is not None and name not in ("config", "resume")
    }
    values |= {"output": folder}
    plain = {
        name: value if isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))
        for name, value in sorted(values.items())
    }
    return _absolute(plain)


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    """Paths from the root, so that the settings are the same ones in another folder."""
    places = {name: Path(values[name]) for name in _PLACES if name in values}
    return values | {name: str(path.absolute()) for name, path in places.items() if path.exists() or name == "output"}


def _check(file: Path, given: dict[str, Any]) -> None:
    if not file.is_file():
        return
    if different := differences(_absolute(options.read_toml(file)), given, {"output"} | MAY_DIFFER):
        raise ConfigError(
            f"the run in {file.parent} has other options: {different}. Resume it with --config {file}, or start anew "
            "in another --output"
        )
