"""Rotary tables of the rows of a compact set of windows. Axes as in `windows.py`; `G` windows attend by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from .window_selection import WindowPartition, merge_windows
from .windows import Windows


def merge_tables(
    tables: tuple[Tensor, Tensor], selected: WindowPartition, windows: Windows, joined: bool
) -> tuple[Tensor, ...]:
    """Each row's mean over the places of its tokens, as `partition.merge_positions` has it: rotary embeddings act
    linearly through their tables.

    Args:
        tables: Of sines and cosines, `(1, A, D)` each, by place in a window.
        selected: Of `match_tokens` or `select_windows`.
        windows: How the map is cut.
        joined: All windows attend together: `G = B`, and tables are `(1, N, D)` by place in the map.

    Returns:
        `(G, 1, R, D)` each; `(1, A, D)` where rows are those of whole windows.
    """
    whole = selected.place is None
    if whole and not joined:
        return tables
    table = torch.cat(tables, dim=-1)[0]
    places = windows.places(table.device)
    by_token = table if joined else table.index_select(0, places.remainder(windows.area))
    batch = selected.partition.group.shape[0]
    merged = merge_windows(by_token.expand(batch, -1, -1), selected, windows)
    if not joined:
        merged = merged.view(batch * selected.windows, -1, merged.shape[-1])
        if windows.padded:
            merged = torch.cat([merged[:, :-1], _of_padding(table, places, windows).repeat(batch, 1, 1)], dim=1)
    return merged.unsqueeze(1).chunk(2, dim=-1)


def _of_padding(table: Tensor, places: Tensor, windows: Windows) -> Tensor:
    """`(V, 1, D)`: the mean over the places of each window's padding, its last row; zeros where it has none."""
    empty = windows.empty(windows.tokens(places))
    number = empty.sum(1, keepdim=True).clamp_min(1)
    return ((empty / number).to(table.dtype) @ table).unsqueeze(1)
