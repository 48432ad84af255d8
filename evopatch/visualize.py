"""Pictures of the token selection, after the paper's Figure 5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor


def draw_selection(images: Tensor, selection: Tensor, blocks: Sequence[int], path: Path, title: str = "") -> None:
    """Rows are images, columns are blocks: slow tokens bright, placeholders dimmed.

    Args:
        images: `(B, height, width)` grey or `(B, height, width, 3)`, in [0, 1].
        selection: `(B, L, h, w)` bool, from `evopatch.token_selection`.
        blocks: Which of the `L` blocks to show.
        path: Where the picture goes; the ending names the format.
        title: Above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(images), 1 + len(blocks)
    figure = Figure(figsize=(1.5 * columns, 1.5 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    size = (images.shape[1], images.shape[2])
    bright = F.interpolate(selection[:, list(blocks)].float(), size=size, mode="nearest")
    shaded = 0.15 + 0.85 * bright
    pixels = images if images.dim() == 4 else images.unsqueeze(-1).expand(-1, -1, -1, 3)
    for row in range(rows):
        panels = [pixels[row], *(pixels[row] * shaded[row, i].unsqueeze(-1) for i in range(len(blocks)))]
        names = ["image", *(f"block {i}\n{selection[row, i].float().mean():.0%} slow" for i in blocks)]
        for axis, panel, name in zip(axes[row], panels, names, strict=True):
            axis.imshow(panel.clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name, fontsize=9)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)
