"""The algorithm on windows, as pure tensor functions: where windows are, which are slow, who stands in for whom.

Swin's blocks attend inside windows, so a compact set has to be whole windows of equally many rows. This is the
project's own extension; the paper has no windowed models. Two ways to get there, both of them an `ops.Partition` over
the tokens in raster order, whose rows lie window by window:

* Windows are slow or fast as a whole (`select_windows`); the compact set is some of the windows.
* All windows stay, and inside each the tokens are matched (`match_tokens`); the compact set is smaller windows.

Axes: `B` images, `N` tokens in raster order, `C` channels, `H` heads, `V` windows, `A` places in a window, `W` windows
of the compact set, `R` rows in each of them, `M = W * R`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

TIE = 1e-4
"""Sums of up to some hundred cosines that differ by less count as equal."""


class Windows(NamedTuple):
    """How one block cuts its feature map: shifted, and padded below and on the right, in whole windows."""

    grid: tuple[int, int]
    """Rows and columns of the feature map, `N` tokens."""
    window: tuple[int, int]
    """Rows and columns of a window, `A` places."""
    shift: tuple[int, int]
    """So far the map is rolled up and to the left before it is cut."""
    pads_first: bool
    """Whether it is padded and then rolled (transformers), or rolled and then padded (timm)."""

    @property
    def across(self) -> tuple[int, int]:
        """How many windows there are below and beside each other."""
        return -(-self.grid[0] // self.window[0]), -(-self.grid[1] // self.window[1])

    @property
    def number(self) -> int:
        """`V`."""
        return self.across[0] * self.across[1]

    @property
    def area(self) -> int:
        """`A`."""
        return self.window[0] * self.window[1]

    @property
    def padded_grid(self) -> tuple[int, int]:
        """Rows and columns of places in all windows together."""
        return self.across[0] * self.window[0], self.across[1] * self.window[1]

    @property
    def padded(self) -> bool:
        """Whether some places hold no token."""
        return self.number * self.area > self.grid[0] * self.grid[1]

    def places(self, device: torch.device) -> Tensor:
        """`(N,)` int64: the place of every token, `window * A + place in the window`."""
        rolled = self.padded_grid if self.pads_first else self.grid
        row = (torch.arange(self.grid[0], device=device) - self.shift[0]).remainder(rolled[0])
        column = (torch.arange(self.grid[1], device=device) - self.shift[1]).remainder(rolled[1])
        (height, width), beside = self.window, self.across[1]
        row = row.div(height, rounding_mode="floor") * (beside * self.area) + row.remainder(height) * width
        column = column.div(width, rounding_mode="floor") * self.area + column.remainder(width)
        return (row[:, None] + column).flatten()

    def tokens(self, places: Tensor) -> Tensor:
        """The inverse of `places`: `(V * A,)` int64, `N` where a place holds no token."""
        tokens = places.shape[0]
        empty = torch.full((self.number * self.area,), tokens, device=places.device)
        return empty.scatter(0, places, torch.arange(tokens, device=places.device))


class WindowPartition(NamedTuple):
    """Who goes through a windowed block for whom."""

    partition: ops.Partition
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


def in_windows(values: Tensor, tokens: Tensor, windows: Windows) -> Tensor:
    """`(B, N)` or `(B, N, C)` in raster order to `(B, V, A)` or `(B, V, A, C)`; zeros in the padding."""
    batch, _, *channels = values.shape
    if windows.padded:
        values = F.pad(values, (*([0, 0] * len(channels)), 0, 1))
    return values.index_select(1, tokens).view(batch, windows.number, windows.area, *channels)


def window_means(values: Tensor, places: Tensor, windows: Windows) -> Tensor:
    """`(B, N)` to `(B, V)`, or `(B, N, C)` to `(B, V, C)`: means over the tokens of each window."""
    batch, tokens, *channels = values.shape
    window = places.div(windows.area, rounding_mode="floor")
    zeros = values.new_zeros(batch, windows.number, *channels)
    sums = zeros.index_add(1, window, values)
    counts = values.new_zeros(windows.number).index_add(0, window, values.new_ones(tokens))
    return sums / counts.view(-1, *([1] * len(channels)))


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
    itself = torch.eye(windows.number, device=metric.device, dtype=torch.bool)
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
    batch, area = loss.shape[0], windows.area
    index = loss.topk(keep, dim=1, sorted=False).indices
    order = torch.arange(keep, device=loss.device).expand(batch, keep)
    row = torch.full(loss.shape, keep, device=loss.device).scatter(1, index, order)
    importance = importance.clamp_min(torch.finfo(importance.dtype).tiny)
    share = torch.where(row == keep, importance, 0.0)
    share = share / share.sum(1, keepdim=True)
    window, place = places.div(area, rounding_mode="floor"), places.remainder(area)
    own_row = row.index_select(1, window)
    slow = own_row < keep
    group = own_row * area + (place if representative else torch.where(slow, place, 0))
    weight = share.index_select(1, window)
    # Where the map is padded, some places hold a token in few of the windows.
    total = torch.zeros(batch, area, device=loss.device).index_add(1, place, weight).index_select(1, place)
    weight = torch.where(slow, 1.0, weight / total if representative else 0.0)
    count = keep + representative
    held = None
    if windows.padded:
        held = torch.zeros(batch, (keep + 1) * area, device=loss.device).scatter(1, group, 1.0).bool()
        held = held[:, : count * area].view(batch, count, area)
    partition = ops.Partition(group, weight, slow, None, count * area, complete=representative)
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
    similarity = unit @ unit.transpose(2, 3)
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
    index = redundancy.topk(keep, dim=2, largest=False, sorted=False).indices
    leader = similarity.gather(3, index.unsqueeze(2).expand(batch, count, area, keep)).argmax(dim=-1)
    leader = leader.scatter(2, index, torch.arange(keep, device=metric.device).expand(batch, count, keep))
    rows = keep + windows.padded
    window = torch.arange(count, device=metric.device).view(count, 1)
    group = (leader + rows * window).flatten(1).index_select(1, places)
    size = torch.zeros(batch, count * rows, device=metric.device)
    size = size.scatter_add(1, group, torch.ones_like(group, dtype=size.dtype))
    slow = torch.zeros(batch, count, area, device=metric.device).scatter(2, index, 1.0).bool()
    partition = ops.Partition(
        group, size.gather(1, group).reciprocal(), slow.flatten(1).index_select(1, places), size.log(), count * rows
    )
    held = (size > 0).view(batch, count, rows) if windows.padded else None
    return WindowPartition(partition, count, place=index, window=None, share=None, held=held)


def compact_mask(mask: Tensor | None, partition: WindowPartition) -> Tensor | None:
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


_MASKED = -100.0


def compact_bias(bias: Tensor, mask: Tensor | None, windows: Windows, partition: WindowPartition) -> Tensor:
    """Position bias, shift mask and log sizes between the rows of matched windows.

    A group has the position of its slow token; its members are near and alike.

    Args:
        bias: `(H, A, A)`.
        mask: `(V, A, A)` or None.
        windows: How the map is cut.
        partition: Of `match_tokens`.

    Returns:
        `(B * V, H, R, R)`.
    """
    place, log_size = partition.place, partition.partition.log_size
    assert place is not None
    assert log_size is not None
    batch, count, keep = place.shape
    area, heads = windows.area, bias.shape[0]
    pairs = (place.unsqueeze(3) * area + place.unsqueeze(2)).view(batch * count, 1, keep * keep)
    compact = bias.flatten(1).expand(batch * count, -1, -1).gather(2, pairs.expand(-1, heads, -1))
    compact = compact.view(batch * count, heads, keep, keep)
    added = log_size.view(batch * count, 1, 1, -1)[..., :keep]
    if mask is not None:
        own = mask.flatten(1).expand(batch, -1, -1).flatten(0, 1).gather(1, pairs.squeeze(1))
        added = added + own.view(-1, 1, keep, keep)
    compact = compact + added.to(bias.dtype)
    if not windows.padded:
        return compact
    column = _padding_bias(bias, mask, windows).expand(batch, -1, -1, -1)
    column = column.gather(3, place.unsqueeze(2).expand(-1, -1, heads, -1)).view(batch * count, heads, keep, 1)
    return F.pad(torch.cat([compact, column], dim=3), (0, 0, 0, 1))


def _padding_bias(bias: Tensor, mask: Tensor | None, windows: Windows) -> Tensor:
    """`(V, H, A)`: what a place's attention to all padding of its window together is biased by."""
    tokens = windows.tokens(windows.places(bias.device))
    empty = (tokens == windows.grid[0] * windows.grid[1]).view(windows.number, 1, windows.area)
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
