"""`evopatch demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import progress_bar
from . import options
from .tables import console


def demo(
    out: Annotated[Path, typer.Option(help="Where the picture of the token selection goes.")] = Path(
        "evopatch-demo.png"
    ),
    config: options.ConfigFile = None,
) -> None:
    """Train a small ViT on scikit-learn's handwritten digits, patch it, compare. No network, a few minutes.

    evopatch demo
    """
    import matplotlib  # noqa: F401, before minutes of training

    from .digits import run

    options.check_folder_of(out, "--out")
    run(out, console, progress_bar)
