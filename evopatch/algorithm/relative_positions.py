"""Decomposed relative positions of attention (MViT v2, arXiv 2112.01526, section 4.1), for the rows of a compact set.

They add to the logit of two tokens what the query says of the rows between them, and of the columns between them:
`q_i . R_h[y_i - y_j] + q_i . R_w[x_i - x_j]`. A matched group is where its slow token is; its members are near and
alike. Axes beside those of `windows.py`: `G` windows that attend by themselves, `D` channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import filled_up
from .window_selection import WindowPartition
from .windows import Windows


class Places(NamedTuple):
    """Where the rows of a compact set are, and how much they weigh."""

    size: tuple[int, int]
    """Rows and columns of places, of a window or of the map."""
    row: Tensor
    """`(G, R)` int64."""
    column: Tensor
    """`(G, R)` int64."""
    log_size: Tensor
    """`(G, R)` float32, minus infinity for what stands for nothing."""
    padding: tuple[Tensor, Tensor] | None
    """`(V, rows)` and `(V, columns)` float32: the shares of a window's padding, which is its last row, in them. None:
    there is none."""


def places_of(selected: WindowPartition, windows: Windows, joined: bool) -> Places:
    """
    Args:
        selected: Of `match_tokens` or `select_windows`.
        windows: How the map is cut.
        joined: All windows attend together: `G = B`, and places are those of the map. False: `G = B * W`.
    """
    place, device = selected.place, selected.partition.group.device
    within = torch.arange(windows.area, device=device)
    batch, rows = selected.partition.group.shape[0], selected.partition.rows // selected.windows
    if place is None:
        place = within.expand(batch, selected.windows, -1)
    # Looked up, as some runtimes don't know whole quotients of what isn't constant.
    row = within.div(windows.window[1], rounding_mode="floor")[place]
    column = within.remainder(windows.window[1])[place]
    if rows > place.shape[2]:  # one more, for the padding
        row, column = F.pad(row, (0, 1)), F.pad(column, (0, 1))
    log_size = _log_sizes(selected, row, only_tokens=joined)
    if joined:
        down, beside = _origins(selected, windows, device)
        # Rows that stand for nothing may lie beyond the map.
        row = (row + down.unsqueeze(2)).clamp(0, windows.grid[0] - 1)
        column = (column + beside.unsqueeze(2)).clamp(0, windows.grid[1] - 1)
        return Places(windows.grid, row.flatten(1), column.flatten(1), log_size.flatten(1), None)
    row, column, log_size = row.flatten(0, 1), column.flatten(0, 1), log_size.flatten(0, 1)
    if selected.place is None or not windows.padded:
        return Places(windows.window, row, column, log_size, None)
    empty = windows.empty(windows.tokens(windows.places(device))).unflatten(1, windows.window).float()
    number = empty.sum((1, 2))
    log_size = torch.cat([log_size[:, :-1], number.log().repeat(batch).unsqueeze(1)], dim=1)
    share = number.clamp_min(1.0).unsqueeze(1)
    return Places(windows.window, row, column, log_size, (empty.sum(2) / share, empty.sum(1) / share))


def _log_sizes(selected: WindowPartition, like: Tensor, only_tokens: bool) -> Tensor:
    """`(B, W, R)`: of groups those of their sizes; of whole windows none, but nothing attends to what isn't there."""
    if selected.partition.log_size is not None:
        return selected.partition.log_size.view(like.shape)
    zeros = torch.zeros(like.shape, device=like.device)
    # Inside a window padding is attended to like tokens; on the map there is none.
    return zeros if selected.held is None or not only_tokens else zeros.masked_fill(~selected.held, -torch.inf)


def _origins(selected: WindowPartition, windows: Windows, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(B or 1, W)` each: the row and the column of the map where each window of the compact set begins.

    The representative window is where the mean of those that it stands for is, by their shares, to the next place.
    """
    window = torch.arange(windows.number, device=device).unsqueeze(0)
    down = window.div(windows.across[1], rounding_mode="floor") * windows.window[0]
    beside = window.remainder(windows.across[1]) * windows.window[1]
    if selected.window is None:
        return down, beside
    origins = []
    for origin in (down, beside):
        own = origin.expand(selected.window.shape[0], -1).gather(1, selected.window)
        if selected.share is not None:
            mean = (selected.share * origin).sum(1, keepdim=True).round().long()
            own = torch.cat([own, mean], dim=1)
        origins.append(own)
    return origins[0], origins[1]


def table_of(between: Tensor) -> Tensor:
    """What stands for each distance between two rows, or columns, from the smallest.

    Args:
        between: `(L, L, D)`, for two of them.

    Returns:
        `(2 L - 1, D)`.
    """
    return torch.cat([between[0].flip(0)[:-1], between[:, 0]])


def relative_bias(query: Tensor, tables: tuple[Tensor, Tensor], places: Places) -> Tensor:
    """
    Args:
        query: `(G, H, R, D)`.
        tables: `(2 rows - 1, D)` and `(2 columns - 1, D)`, see `table_of`.
        places: Of the rows.

    Returns:
        What is added to the logits, log sizes included: `(G, H, R, R)`.
    """
    said = [query @ table.to(query.dtype).transpose(0, 1) for table in tables]
    axes = list(zip(said, (places.row, places.column), places.size, strict=True))
    sizes = filled_up(places.log_size)
    bias = sum((_said_of(of, place, filled_up(place), length) for of, place, length in axes), sizes[:, None, None])
    bias = bias.to(query.dtype)
    if sizes is not places.log_size:
        bias = bias[..., : query.shape[2]]
    if places.padding is None:
        return bias
    # All padding of a window together: the mean over its places.
    column: Tensor = places.log_size[:, -1, None, None].to(query.dtype)
    for (of, place, length), share in zip(axes, places.padding, strict=True):
        there = torch.arange(length, device=query.device).expand(place.shape[0], length)
        share = share.to(query.dtype).repeat(query.shape[0] // share.shape[0], 1)
        column = column + (_said_of(of, place, there, length) * share[:, None, None]).sum(-1)
    return torch.cat([bias[..., :-1], column.unsqueeze(-1)], dim=-1)


def _said_of(said: Tensor, asking: Tensor, answering: Tensor, length: int) -> Tensor:
    """Of `(G, H, R, 2 length - 1)`, by distance, what `(G, R)` places say of `(G, S)` others: `(G, H, R, S)`."""
    distance = asking.unsqueeze(2) - answering.unsqueeze(1) + (length - 1)
    return said.gather(3, distance.unsqueeze(1).expand(-1, said.shape[1], -1, -1))
