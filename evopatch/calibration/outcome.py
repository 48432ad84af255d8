"""What a calibration found."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import EvoConfig
from ..durable import make_folder
from ..measure.kinds import Kind
from .target import Target

FILE_NAME, PICTURE = "calibration.json", "calibration.png"


@dataclass(frozen=True)
class Point:
    """One setting on the images to report on: the search never saw them, but what was kept of what it found was decided
    on them."""

    name: str
    """`"default"` for the settings that the search began with, `"calibrated"` for those that it found, and what of
    both at other costs."""
    config: EvoConfig
    flops: float
    """Whole model, relative to unpatched."""
    speed_up: float
    """Times as fast as unpatched, measured."""
    error: float
    """Mean over the images: of classes KL(unpatched || patched) in nats, of labels the same summed over them; of a
    regression's numbers the squared difference to the unpatched ones relative to their variance between images, mean
    over the numbers (0 is none, 1 is as much as the same answer for all); of features one minus the cosine."""
    agreement: float | None
    """Share of the images whose predicted class is the unpatched model's; None of other outputs than classes."""


@dataclass(frozen=True)
class Calibration:
    """What was asked for, what was found, and how good it is."""

    target: Target
    reached: bool
    """By the measure of the target: FLOPs and speed of the model, loss on the images to report on. A speed-up counts as
    reached from 3 % below it on, as two measurements differ by as much."""
    before: Point
    """The settings that the search began with, at the same FLOPs, or as near as they come."""
    after: Point
    """Those that the model has now."""
    curve: tuple[Point, ...]
    """Both at more and fewer FLOPs, these two included."""
    foresight: bool
    """Whether tokens are ranked by foresight."""
    corrected: tuple[tuple[int, int], ...]
    """First and last block of the runs whose restored change is corrected."""
    outputs: Kind
    """What is compared: `"classes"`, `"labels"` (several an image), `"numbers"` (regression), `"features"`."""
    searched: int
    """Images that were searched on."""
    reported: int
    """Images that were reported on."""
    tried: int
    """Settings."""
    seconds: float
    batch_size: int
    """Of the forwards that were timed."""
    device: str
    dtype: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        values["curve"] = [_plain(point) for point in self.curve]
        return values | {"before": _plain(self.before), "after": _plain(self.after)}

    def save(self, folder: str | Path) -> None:
        """Write `calibration.json` and the picture `calibration.png`, such as beside the model that
        `evopatch.save_pretrained` writes.

        Args:
            folder: Made if missing.
        """
        from .picture import draw

        make_folder(folder, "for the table and the picture")
        Path(folder, FILE_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        draw(self).savefig(Path(folder, PICTURE), bbox_inches="tight")


def _plain(point: Point) -> dict[str, Any]:
    return dataclasses.asdict(point) | {"config": point.config.to_dict()}
