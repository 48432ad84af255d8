"""Where the windows of a windowed block (Swin) are.

Axes, in all modules on windows: `B` images, `N` tokens in raster order, `C` channels, `H` heads, `V` windows, `A`
places in a window, `W` windows of the compact set, `R` rows in each of them, `M = W * R`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Windows:
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
        # Never below zero: TorchInductor (2.14) can't bound what indexes with the remainders of such numbers.
        row = (torch.arange(self.grid[0], device=device) + (rolled[0] - self.shift[0])).remainder(rolled[0])
        column = (torch.arange(self.grid[1], device=device) + (rolled[1] - self.shift[1])).remainder(rolled[1])
        (height, width), beside = self.window, self.across[1]
        row = row.div(height, rounding_mode="floor") * (beside * self.area) + row.remainder(height) * width
        column = column.div(width, rounding_mode="floor") * self.area + column.remainder(width)
        return (row[:, None] + column).flatten()

    def tokens(self, places: Tensor) -> Tensor:
        """The inverse of `places`: `(V * A,)` int64, `N` where a place holds no token."""
        tokens = places.shape[0]
        empty = torch.full((self.number * self.area,), tokens, dtype=torch.int64, device=places.device)
        return empty.scatter(0, places, torch.arange(tokens, device=places.device))

    def empty(self, tokens: Tensor) -> Tensor:
        """`(V, A)` bool: the places that hold no token.

        Args:
            tokens: As `tokens` gives them.
        """
        return (tokens == self.grid[0] * self.grid[1]).view(self.number, self.area)


def in_windows(values: Tensor, tokens: Tensor, windows: Windows) -> Tensor:
    """`(B, N)` or `(B, N, C)` in raster order to `(B, V, A)` or `(B, V, A, C)`; zeros in the padding."""
    batch, _, *channels = values.shape
    if windows.padded:
        values = F.pad(values, (*([0, 0] * len(channels)), 0, 1))
    return values.index_select(1, tokens).view(batch, windows.number, windows.area, *channels)


def window_means(values: Tensor, places: Tensor, windows: Windows) -> Tensor:
    """`(B, N)` to `(B, V)`, or `(B, N, C)` to `(B, V, C)`: means over the tokens of each window."""
    sums = in_windows(values, windows.tokens(places), windows).sum(2)
    if not windows.padded:
        return sums / windows.area
    counts = in_windows(values.new_ones(1, places.shape[0]), windows.tokens(places), windows).sum(2)
    return sums / counts.view(1, -1, *([1] * (values.dim() - 2)))
