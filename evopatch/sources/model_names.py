"""Names of models: whose they are, and what was meant by one that isn't known."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from ..errors import CheckpointError, UnsupportedModelError

_HINTS = 3
"""Names that a message proposes, at most."""


def library_and_source(name: str) -> tuple[str, str]:
    """Which library a name is for, and what that library calls it.

    Raises:
        CheckpointError: If it is a folder of neither.
    """
    config = Path(name) / "config.json"
    if config.is_file():
        try:
            values = json.loads(config.read_text())
        except ValueError as error:
            raise CheckpointError(f"{config} is damaged or no JSON: {error}") from error
        return ("timm", f"local-dir:{name}") if "architecture" in values else ("transformers", name)
    if Path(name).is_dir():
        raise CheckpointError(f"{name} is a folder without config.json: expected one that transformers or timm wrote")
    return "transformers" if "/" in name and ":" not in name else "timm", name


def check_timm_name(name: str) -> None:
    """
    Raises:
        UnsupportedModelError: If timm has no such model; names similar ones.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        raise UnsupportedModelError(f"timm has no model named '{name}': {hint(name)}")


def named(pattern: str) -> list[str]:
    """timm's names that a wildcard fits; without a wildcard the one of that name, or those that begin with it."""
    import timm

    pattern = _spelled(pattern)
    found: list[str] = timm.list_models(pattern)
    return found or (timm.list_models(f"{pattern}*") if pattern and not set(pattern) & set("*?[") else [])


def hint(name: str) -> str:
    """What may have been meant by a name that timm doesn't have."""
    import timm

    asked = _spelled(name.split(".")[0])
    # The plain model of a family has a shorter name than its variants.
    longer = sorted(timm.list_models(f"{asked}*"), key=len) if asked.isidentifier() else []
    similar = longer or difflib.get_close_matches(asked, timm.list_models(), n=_HINTS, cutoff=0.6)
    return f"did you mean {' or '.join(similar[:_HINTS])}?" if similar else "`evopatch list` shows the names."


def _spelled(name: str) -> str:
    """As timm spells names."""
    return name.lower().replace("-", "_")
