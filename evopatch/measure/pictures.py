"""Pictures: which tokens are slow, after the paper's Figure 5, and speed-up against keep ratio."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..patching.handle import Patched
from ..patching.inspect import block_maps
from .comparison import Benchmark

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIMMED = 0.15
_GOLDEN = 0.618034
"""Steps of this size around the colour circle keep numbers that follow each other far apart."""


def visualize(
    model: nn.Module,
    images: Tensor,
    *,
    blocks: Sequence[int] | None = None,
    groups: bool = False,
    pixels: Tensor | None = None,
    **model_inputs: Any,
) -> Figure:
    """The left half of the paper's Figure 5: rows are images, columns are blocks.

    Slow tokens are bright and placeholders dimmed, or with `groups` the tokens of a matched group have one colour.

    Args:
        model: A model that takes images and holds one patched host, or is one.
        images: `(B, channels, height, width)`, normalised as the model expects.
        blocks: Which blocks, counted from 0. None: those that select anew.
        groups: Colour the groups.
        pixels: `(B, height, width, 3)` or `(B, height, width)` in [0, 1], what to show them on. None: the images,
            stretched to [0, 1].
        **model_inputs: What else the model's forward takes, such as `interpolate_pos_encoding=True`.

    Returns:
        matplotlib's figure: `figure.savefig("selection.png")`.

    Raises:
        ConfigError: If there is no such block.
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If several hosts in it are patched.
    """
    blocks = _checked(Patched(model), blocks)
    maps = block_maps(model, images, **model_inputs)
    panels = []
    for block in blocks:
        slow, members = maps[block]
        panels.append((f"block {block}\n{slow.float().mean():.0%} slow", members if groups else slow))
    return draw(_pixels(images) if pixels is None else pixels, panels)


@torch.no_grad()
def visualize_training(
    model: nn.Module,
    images: Tensor,
    checkpoints: Mapping[str, Mapping[str, Tensor]],
    *,
    block: int | None = None,
    pixels: Tensor | None = None,
) -> Figure:
    """The right half of the paper's Figure 5: rows are images, columns are checkpoints of one training.

    Args:
        model: As for `visualize`; keeps its weights.
        images: As for `visualize`.
        checkpoints: State dicts by name, in the order of the columns.
        block: Whose selection. None: the last block that selects anew.
        pixels: As for `visualize`.

    Returns:
        matplotlib's figure.

    Raises:
        ConfigError: If there is no such block.
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If several hosts in it are patched.
    """
    patched = Patched(model)
    block = _checked(patched, None if block is None else [block])[-1]
    patched.forget_caches()  # may hold tensors of a graph, which can't be copied
    other = copy.deepcopy(model)
    panels = []
    for name, state in checkpoints.items():
        other.load_state_dict(dict(state))  # `block_maps` forgets what was computed from other weights
        selection, _ = block_maps(other, images)[block]
        panels.append((f"{name}\nblock {block}", selection))
    return draw(_pixels(images) if pixels is None else pixels, panels)


def draw(pixels: Tensor, panels: Sequence[tuple[str, Tensor]]) -> Figure:
    """A row per image: the image, then one panel after the other.

    Args:
        pixels: `(B, height, width, 3)` or `(B, height, width)` in [0, 1].
        panels: Title, and over the grid `(B, h, w)`: bool, False is dimmed; or int64, a colour per number that
            occurs more than once.
    """
    from matplotlib.figure import Figure

    pixels = (pixels if pixels.dim() == 4 else pixels.unsqueeze(-1).expand(-1, -1, -1, 3)).float().cpu()
    rows, columns = len(pixels), 1 + len(panels)
    figure = Figure(figsize=(1.6 * columns, 1.6 * rows + 0.5), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False)
    drawn = [("image", pixels), *((title, _shaded(pixels, values.cpu())) for title, values in panels)]
    for column, (title, shown) in enumerate(drawn):
        axes[0][column].set_title(title, fontsize=8)
        for row in range(rows):
            axes[row][column].imshow(shown[row].clamp(0, 1).numpy(), interpolation="nearest")
            axes[row][column].set_axis_off()
    return figure


def _shaded(pixels: Tensor, values: Tensor) -> Tensor:
    size = pixels.shape[1:3]
    if values.dtype == torch.bool:
        bright = F.interpolate(values.unsqueeze(1).float(), size=size, mode="nearest").squeeze(1).unsqueeze(-1)
        return pixels * (_DIMMED + (1 - _DIMMED) * bright)
    from matplotlib.colors import hsv_to_rgb

    flat = values.flatten(1)
    count = torch.zeros(len(flat), int(flat.max()) + 1).scatter_add(1, flat, torch.ones(flat.shape))
    several = (count.gather(1, flat) > 1).view_as(values)
    hue = (values * _GOLDEN) % 1.0
    colour = torch.from_numpy(hsv_to_rgb(torch.stack([hue, torch.ones_like(hue), torch.ones_like(hue)], -1).numpy()))
    coloured = torch.cat([colour.permute(0, 3, 1, 2), several.unsqueeze(1)], dim=1).float()
    colour, several = F.interpolate(coloured, size=size, mode="nearest").permute(0, 2, 3, 1).split([3, 1], dim=-1)
    shaded: Tensor = pixels * (1 - 0.6 * several) + 0.6 * several * colour
    return shaded


def _pixels(images: Tensor) -> Tensor:
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)).permute(0, 2, 3, 1)


def _checked(patched: Patched[nn.Module], blocks: Sequence[int] | None) -> list[int]:
    plans = patched.host.state.plans
    if blocks is None:
        return [index for index, plan in enumerate(plans) if plan.selects] or [len(plans) - 1]
    for block in blocks:
        if not 0 <= block < len(plans):
            raise ConfigError(f"block {block}: expected one of the blocks 0 to {len(plans) - 1}")
    return list(blocks)


def draw_speed(results: Sequence[Benchmark], path: Path, title: str) -> None:
    """Speed-up against keep ratio, one line per batch size, dashed what the FLOPs promise.

    Args:
        results: With several keep ratios each; sides without a single number for it are left out.
        path: Where the picture goes; the ending names the format.
        title: Above it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    for result in results:
        sides = [side for side in result.sides if side.config and isinstance(side.config.keep_ratio, float)]
        for kind in dict.fromkeys(side.config.representative for side in sides if side.config):
            points = sorted(
                (side.config.keep_ratio, side.speed_up, *side.speed_up_spread, 1 / side.flops)
                for side in sides
                if side.config and side.config.representative == kind
            )
            ratio, middle, low, high, promised = zip(*points, strict=True)
            (line,) = axes.plot(ratio, middle, "o-", label=f"{kind}, batch {result.batch_size}")
            axes.fill_between(ratio, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            axes.plot(ratio, promised, "--", color=line.get_color(), linewidth=1)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xlabel="keep ratio", ylabel="speed-up (dashed: by FLOPs)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
