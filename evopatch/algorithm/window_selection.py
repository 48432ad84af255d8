"""Which windows, or which tokens inside windows, are slow, and who stands in for the others.

Swin's blocks attend inside windows, so a compact set has to be whole windows of equally many rows. This is the
project's own extension; the paper has no windowed models. Two ways to get there, both of them a `Partition` over the
tokens in raster order, whose rows lie window by window:

* Windows are slow or fast as a whole (`select_windows`); the compact set is some of the windows.
* All windows stay, and inside each the tokens are matched (`match_tokens`); the compact set is smaller windows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .importance import detached
from .partition import Partition, merge
from .rows import by_product, exporting, members, row_sums, top
from .selection import similarities
from .windows import Windows, in_windows

TIE = 1e-4
"""Sums of up to some hundred cosines that differ by less count as equal."""


class WindowPartition(NamedTuple):
    """Who goes through a windowed block for whom."""

    partition: Partition
    """Over the tokens in raster order; its rows are those of the first window, then of the second, and so on."""
    windows: int
    """`W`."""
    place: Tensor | None
    """`(B, W, R)` int64: the place in its window that a row stands at; None: the `A` places of a whole window."""
    window: Tensor | None
    """`(B, K)` int64: the windows that are slow; None: all windows are in the compact set."""
    share: Tensor | None
    """`(B, V)` float32: each window's share in the representative window, the last one; None: there is none."""
    held: Tensor | None
    """`(B, W, R)` bool, False where a row stands for no token but for padding; None: all stand for tokens."""

    def of_images(self, images: slice) -> WindowPartition:
        """Of some of the images."""
        place, window, share, held = (
            None if tensor is None else tensor[images] for tensor in (self.place, self.window, self.share, self.held)
        )
        partition = self.partition.of_images(images)
        return self._replace(partition=partition, place=place, window=window, share=share, held=held)

    def to(self, device: torch.device) -> WindowPartition:
        """The same on a device, for models spread over several."""
        if self.partition.group.device == device:
            return self
        place, window, share, held = (
            None if tensor is None else tensor.to(device) for tensor in (self.place, self.window, self.share, self.held)
        )
        return self._replace(partition=self.partition.to(device), place=place, window=window, share=share, held=held)


def window_novelty(metric: Tensor, tokens: Tensor, windows: Windows) -> Tensor:
    """How little of a window another one already says: `1 - max_{w not v} <f_v, f_w>`.

    Args:
        metric: `(B, N, C)`, what the windows are compared by, place by place.
        tokens: `(V * A,)`.
        windows: How the map is cut, into at least two.

    Returns:
        `(B, V)` float32 with `f` the normalised metric of all places of a window.
    """
    unit = F.normalize(in_windows(metric, tokens, windows).flatten(2), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    window = torch.arange(windows.number, device=metric.device)
    itself = window.unsqueeze(1) == window
    return 1.0 - similarity.masked_fill(itself, -1.0).amax(dim=-1).float()


def select_windows(
    loss: Tensor, importance: Tensor, keep: int, places: Tensor, windows: Windows, representative: bool
) -> WindowPartition:
    """The `K` windows that would lose most are slow.

    Args:
        loss: `(B, V)` float32, what would be lost if a window were fast.
        importance: `(B, V)` float32, at least 0.
        keep: `K`, less than `V`.
        places: `(N,)`.
        windows: How the map is cut.
        representative: True: the fast windows share one more window, place by place their mean weighted by importance
            (equation 5 for every place). False: nothing stands in for them.
    """
    # A trace doesn't record that gradients are off around the selection.
    loss, importance = detached(loss), detached(importance)
    batch, area = loss.shape[0], windows.area
    index = top(loss, keep)
    order = torch.arange(keep, device=loss.device).expand(batch, keep)
    row = torch.full(loss.shape, keep, dtype=torch.int64, device=loss.device).scatter(1, index, order)
    importance = importance.clamp_min(torch.finfo(importance.dtype).tiny)
    share = importance.masked_fill(row < keep, 0.0)
    share = share / share.sum(1, keepdim=True)
    window, place = places.div(area, rounding_mode="floor"), places.remainder(area)
    own_row = row.index_select(1, window)
    slow = own_row < keep
    group = own_row * area + (place if representative else place * slow)
    weight = share.index_select(1, window)
    # Where the map is padded, some places hold a token in few of the windows.
    shares = in_windows(weight, windows.tokens(places), windows)
    weight = weight / shares.sum(1).index_select(1, place) if representative else torch.zeros_like(weight)
    weight = weight.masked_fill(slow, 1.0)
    count = keep + int(representative)
    held = None
    if windows.padded:
        there = windows.tokens(places).view(windows.number, area) < places.shape[0]
        held = there[index]
        if representative:
            held = torch.cat([held, (there & (row == keep).unsqueeze(2)).any(1, keepdim=True)], dim=1)
    partition = Partition(group, weight, slow, None, count * area, complete=representative)
    return WindowPartition(partition, count, None, index, share if representative else None, held)


def match_tokens(metric: Tensor, keep: int, places: Tensor, windows: Windows, mask: Tensor | None) -> WindowPartition:
    """Matched representatives inside every window: each fast token joins the slow token of its window most like it.

    What would be lost if a token were fast is how little of it an earlier one of its window already says,
    `1 - max_{j before i} <f_i, f_j>`, with `f` the normalised metric. First come the tokens that are most like all of
    their window. The `K` tokens of each window that would lose most are slow. A group's row is the mean of its members,
    and weighs in attention by its size. Where the map is padded, the padding of each window is one more row.

    Args:
        metric: `(B, N, C)`, what the tokens are compared by.
        keep: `K`, less than `A`; with a mask at least as many as there are regions in a window, 4.
        places: `(N,)`.
        windows: How the map is cut.
        mask: `(V, A, A)`, 0 where two tokens attend to each other: only such tokens share a group. None: all do.
    """
    batch, number = metric.shape[:2]
    count, area = windows.number, windows.area
    tokens = windows.tokens(places)
    unit = in_windows(F.normalize(metric, dim=-1), tokens, windows)
    vectors = unit.flatten(0, 1)
    similarity = similarities(vectors, vectors).view(batch, count, area, area)
    lowest = torch.finfo(similarity.dtype).min
    # Equal tokens, as in a plain background, need an order too: all but the first of them are redundant.
    typical = similarity.sum(dim=-1, dtype=torch.float32) - TIE * torch.arange(area, device=metric.device)
    if mask is not None:
        similarity = similarity.masked_fill(mask != 0, lowest)
    not_before = typical.unsqueeze(3) >= typical.unsqueeze(2)
    redundancy = similarity.masked_fill(not_before, lowest).amax(dim=-1)
    is_token = (tokens < number).view(count, area)
    if windows.padded:
        redundancy = redundancy.masked_fill(~is_token, torch.inf)
    index = top(redundancy, keep, largest=False)
    leader = similarity.gather(3, index.unsqueeze(2).expand(batch, count, area, keep)).argmax(dim=-1)
    leader = leader.scatter(2, index, torch.arange(keep, device=metric.device).expand(batch, count, keep))
    rows = keep + int(windows.padded)
    window = torch.arange(count, device=metric.device).view(count, 1)
    group = (leader + rows * window).flatten(1).index_select(1, places)
    if exporting():  # no token is in a row of another window
        size = (members(leader, rows) & is_token.unsqueeze(1)).sum(-1).flatten(1).float()
    else:
        (size,) = row_sums(group, count * rows, torch.ones(group.shape, device=metric.device))
    slow = index.gather(2, leader) == torch.arange(area, device=metric.device)
    slow = slow.flatten(1).index_select(1, places)
    partition = Partition(group, size.gather(1, group).reciprocal(), slow, size.log(), count * rows)
    held = (size > 0).view(batch, count, rows) if windows.padded else None
    return WindowPartition(partition, count, place=index, window=None, share=None, held=held)


def merge_windows(x: Tensor, selected: WindowPartition, windows: Windows) -> Tensor:
    """`merge`, of `(B, N, C)` tokens to the `(B, M, C)` rows of the windows of the compact set."""
    partition = selected.partition
    if not by_product(x):
        return merge(x, partition)
    # One product over all tokens of the map and all rows would take longer than the blocks.
    batch, _, channels = x.shape
    tokens = windows.tokens(windows.places(x.device))
    values = in_windows(x * partition.weight.unsqueeze(-1).to(x.dtype), tokens, windows)
    if selected.window is None:
        rows = partition.rows // windows.number
        member = members(in_windows(partition.group.remainder(rows), tokens, windows), rows)
    else:
        member = selected.window.unsqueeze(2) == torch.arange(windows.number, device=x.device)
        if selected.share is not None:
            member = torch.cat([member, ~member.any(1, keepdim=True)], dim=1)
        values = values.flatten(2)
    return (member.to(x.dtype) @ values).view(batch, -1, channels)
