"""Names of timm's models that `evopatch.apply` takes, as `docs/supported_models.py` found by trying each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

LIST = Path(__file__).with_name("patched_names.txt")


def patched_names() -> frozenset[str]:
    """The installed version's. None where the list is of another, which may build its models otherwise."""
    import timm

    version, *names = LIST.read_text().split()
    return frozenset(names) if version == f"timm=={timm.__version__}" else frozenset()


def write(names: Iterable[str]) -> None:
    """Make the list anew, for the installed version of timm."""
    import timm

    LIST.write_text("\n".join([f"timm=={timm.__version__}", *sorted(names)]) + "\n")
