"""How images become a model's input."""

from __future__ import annotations

from typing import NamedTuple


class Preprocessing(NamedTuple):
    """What to change in the model's own preprocessing; None leaves it."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    image_size: int | None = None
