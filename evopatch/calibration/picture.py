"""Error against FLOPs and against measured time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..measure.kinds import MEASURES
from .outcome import Calibration, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"default": "0.55", "calibrated": "tab:blue"}


def draw(result: Calibration) -> Figure:
    """Default and calibrated settings; the one that the model has is marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, label, of in zip(
        axes, ("FLOPs, relative to unpatched", "time, relative to unpatched"), (_flops, _time), strict=True
    ):
        for name, colour in _COLOURS.items():
            points = sorted((point for point in result.curve if point.name == name), key=of)
            axis.plot(list(map(of, points)), [point.error for point in points], "o-", color=colour, label=name)
        axis.plot(of(result.after), result.after.error, "*", color="tab:red", markersize=14, label="chosen")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{MEASURES[result.outputs].text},\n{result.reported} images")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    return figure


def _flops(point: Point) -> float:
    return point.flops


def _time(point: Point) -> float:
    return 1.0 / point.speed_up
