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


def check(folder: Path, ctx: typer.Context) -> None:
    """Whether a command can begin its run in a folder, or go on with the one that is there.

    Args:
        folder: Of the run.
        ctx: Of the command, with the values of all of its options.

    Raises:
        CheckpointError: If there is a run and it isn't to be resumed, or the other way round; or if it is a file.
        ConfigError: If the run is resumed with other options than it was begun with.
    """
    from ..training import checkpoints

    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--output {folder} is a file: expected a folder for the run")
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
    return {
        name: value if isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))
        for name, value in sorted(values.items())
    }


def _check(file: Path, given: dict[str, Any]) -> None:
    if not file.is_file():
        return
    if different := differences(options.read_toml(file), given, {"output"} | MAY_DIFFER):
        raise ConfigError(
            f"the run in {file.parent} has other options: {different}. Resume it with --config {file}, or start anew "
            "in another --output"
        )
