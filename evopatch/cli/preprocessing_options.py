"""The options that change a model's own preprocessing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..sources.preprocessing import Preprocessing
from . import options
from .expansion import Option, expanded


def _option(kind: Any, text: str) -> Any:
    return Annotated[kind, typer.Option(help=text)]


_OPTIONS = {
    "mean": Option(_option(str | None, "Normalisation mean, one number or three.")),
    "std": Option(_option(str | None, "Normalisation standard deviation, one number or three.")),
    "crop_pct": Option(_option(float | None, "Share of the image kept by the centre crop, in (0, 1].")),
    "image_size": Option(options.ImageSize),
}


def _preprocessing(mean: str | None, std: str | None, crop_pct: float | None, image_size: int | None) -> Preprocessing:
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise typer.BadParameter(f"--crop-pct {crop_pct}: expected a share in (0, 1]")
    means, stds = options.parse_channels(mean, "--mean"), options.parse_channels(std, "--std", positive=True)
    return Preprocessing(means, stds, crop_pct, image_size)


with_preprocessing = expanded("preprocessing", _OPTIONS, _preprocessing)
"""For a command with a parameter `preprocessing: Preprocessing`."""
