"""The options of a run as a TOML file in its folder, for `--config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..errors import ConfigError
from ..training.settings import MAY_DIFFER
from . import options

NAME = "config.toml"


def save(folder: Path, ctx: typer.Context) -> None:
    """Write the options of a command to the folder of the run that it begins, or check them against what is there.

    Args:
        folder: Of the run.
        ctx: Of the command, with the values of all of its options.

    Raises:
        ConfigError: If the run is resumed with other options than it was begun with.
    """
    import tomli_w

    from ..training import checkpoints, processes

    values = {
        name: value for name, value in ctx.params.items() if value is not None and name not in ("config", "resume")
    }
    values |= {"output": folder}
    plain = {
        name: value if isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))
        for name, value in values.items()
    }
    # A run that is resumed, or refused since there is one already, keeps its own.
    if checkpoints.steps(folder):
        if ctx.params["resume"]:
            _check(folder / NAME, plain)
    elif processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NAME).write_text(tomli_w.dumps(dict(sorted(plain.items()))))


def _check(file: Path, given: dict[str, Any]) -> None:
    if not file.is_file():
        return
    saved = options.read_toml(file)
    names = sorted((saved.keys() | given.keys()) - {"output"} - MAY_DIFFER)
    different = [name for name in names if saved.get(name) != given.get(name)]
    if different:
        raise ConfigError(
            f"the run in {file.parent} has other options: "
            + ", ".join(f"{name} was {saved.get(name)!r} and is {given.get(name)!r} now" for name in different)
            + f". Resume it with --config {file}, or start anew in another --output"
        )
