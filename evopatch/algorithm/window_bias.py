"""Position biases and shift masks of windows, for a compact set."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import exporting, filled_up
from .window_selection import WindowPartition
from .windows import Windows

_MASKED = -100.0


def shift_mask(windows: Windows, like: Tensor) -> Tensor | None:
    """Of a shifted map, which places of a window hold parts of the image that lie side by side.

    Args:
        windows: How the map is cut; padded first.
        like: Of the type and on the device that are wanted.

    Returns:
        `(V, A, A)`, 0 or -100, as Swin's own; None where nothing is shifted.
    """
    if not any(windows.shift):
        return None
    axes = zip(windows.padded_grid, windows.window, windows.shift, strict=True)
    row, column = (_regions(*axis, like.device) for axis in axes)
    (down, beside), (height, width) = windows.across, windows.window
    region = (row.unsqueeze(1) * 3 + column).view(down, height, beside, width).transpose(1, 2).flatten(0, 1).flatten(1)
    return (region.unsqueeze(1) != region.unsqueeze(2)).to(like.dtype) * _MASKED


def _regions(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    if not shift:
        return torch.zeros_like(place)
    return (place >= length - window).long() + (place >= length - shift).long()


def compact_bias(bias: Tensor, mask: Tensor | None, windows: Windows, partition: WindowPartition) -> Tensor:
    """Position bias, shift mask and log sizes between the rows of the windows of a compact set.

    A matched group has the position of its slow token; its members are near and alike.

    Args:
        bias: `(H, A, A)`.
        mask: `(V, A, A)` or None.
        windows: How the map is cut.
        partition: Of `match_tokens` or `select_windows`.

    Returns:
        `(B * W, H, R, R)`, or `(1, H, A, A)` where it is the same for all windows.
    """
    place, log_size = partition.place, partition.partition.log_size
    if place is None:
        whole = _compact_mask(mask, partition)
        return bias.unsqueeze(0) if whole is None else bias + whole.unsqueeze(1).to(bias.dtype)
    assert log_size is not None
    batch, count, keep = place.shape
    area, heads = windows.area, bias.shape[0]
    columns = filled_up(place)
    wide = columns.shape[2]
    pairs = (place.unsqueeze(3) * area + columns.unsqueeze(2)).view(batch * count, 1, keep * wide)
    if exporting():
        # Other runtimes copy the table for every window before they gather.
        compact = bias.flatten(1).t().index_select(0, pairs.flatten())
        compact = compact.view(batch * count, keep, wide, heads).permute(0, 3, 1, 2)
    else:
        compact = bias.flatten(1).expand(batch * count, -1, -1).gather(2, pairs.expand(-1, heads, -1))
        compact = compact.view(batch * count, heads, keep, wide)
    added = filled_up(log_size.view(batch * count, 1, 1, log_size.shape[1] // count)[..., :keep])
    if mask is not None:
        own = mask.flatten(1).expand(batch, -1, -1).flatten(0, 1).gather(1, pairs.squeeze(1))
        added = added + own.view(-1, 1, keep, wide)
    compact = compact + added.to(bias.dtype)
    if columns is not place:
        compact = compact[..., :keep]
    if not windows.padded:
        return compact
    column = _padding_bias(bias, mask, windows).expand(batch, -1, -1, -1)
    column = column.gather(3, place.unsqueeze(2).expand(-1, -1, heads, -1)).view(batch * count, heads, keep, 1)
    return F.pad(torch.cat([compact, column], dim=3), (0, 0, 0, 1))


def _compact_mask(mask: Tensor | None, partition: WindowPartition) -> Tensor | None:
    """The shift mask of whole windows, for those of the compact set.

    A representative window stands for several. Two places in it attend to each other as far as they do there: their
    logit is lowered by the logarithm of the share of windows in which they do.

    Args:
        mask: `(V, A, A)`, 0 or a large negative number; or None.
        partition: Of `select_windows`.

    Returns:
        `(B * W, A, A)`, or None.
    """
    if mask is None:
        return None
    assert partition.window is not None
    compact = mask[partition.window]
    if partition.share is not None:
        share = torch.einsum("bv,vij->bij", partition.share, (mask == 0).to(partition.share.dtype))
        together = share.log().clamp_min(float(_MASKED)).to(mask.dtype)
        compact = torch.cat([compact, together.unsqueeze(1)], dim=1)
    return compact.flatten(0, 1)


def _padding_bias(bias: Tensor, mask: Tensor | None, windows: Windows) -> Tensor:
    """`(V, H, A)`: what a place's attention to all padding of its window together is biased by."""
    tokens = windows.tokens(windows.places(bias.device))
    empty = windows.empty(tokens).unsqueeze(1)
    seen = empty.expand(-1, windows.area, -1) if mask is None else empty & (mask == 0)
    number = seen.sum(2).unsqueeze(1)
    mean = torch.einsum("hij,vij->vhi", bias, seen.to(bias.dtype)) / number.clamp_min(1).to(bias.dtype)
    return mean + number.to(bias.dtype).log()


def cosine_logits(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled cosine attention (Swin V2, arXiv 2111.09883, equation 2) without its position bias.

    Args:
        query: `(B, H, R, D)`, key `(B, H, T, D)`.
        logit_scale: `(H, 1, 1)`, logarithm of the factor on the cosines, which is at most 100.

    Returns:
        `(B, H, R, T)`.
    """
    cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(2, 3)
    return cosine * logit_scale.clamp(max=math.log(100.0)).exp()


def continuous_bias(table: Callable[[Tensor], Tensor], coordinates: Tensor, index: Tensor) -> Tensor:
    """Swin V2's position bias (arXiv 2111.09883, section 3.3): `16 * sigmoid` of what a small network says.

    Args:
        table: That network, of the relative coordinates.
        coordinates: `(1, 2h - 1, 2w - 1, 2)`.
        index: `(A, A)`, which coordinates two places are apart.

    Returns:
        `(H, A, A)`.
    """
    return (16.0 * table(coordinates).flatten(0, 2).sigmoid())[index].permute(2, 0, 1)
