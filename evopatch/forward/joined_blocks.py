"""Blocks of which some attend inside windows and others over the whole map (SAM, ViTDet).

Tokens are matched inside windows in all of them, so that a run of both kinds has one partition. The windows are those
of the blocks that have any, unshifted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ..algorithm.relative_positions import places_of
from ..algorithm.window_selection import WindowPartition
from ..algorithm.window_tables import merge_tables
from ..algorithm.windows import Windows
from ..rewrite.quiet import quietly
from .block import TappedAttention
from .window_blocks import Cut, WindowedBlocks
from .window_tap import RotatedTap, WindowTap


class JoinedBlocks(WindowedBlocks):
    """
    Args:
        window: Rows and columns of a window where a block attends over the whole map.
    """

    traced: type[TappedAttention] | None = TappedAttention
    single: Mapping[str, Any] = {"window_size": 0}

    def __init__(self, window: int) -> None:
        self.window = window

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        windows = Windows((x.shape[1], x.shape[2]), (block.window_size or self.window,) * 2, (0, 0), pads_first=True)
        return Cut(windows, None, joined=not block.window_size)

    def laid_out(self, windows: Tensor) -> Tensor:
        return windows.unsqueeze(2)


class RotatedBlocks(JoinedBlocks):
    """The same with rotary positions, by tables of sines and cosines that the block gives to its attention (SAM 3)."""

    tables: str
    """The attention's argument that they are, in a tuple: `(1, A, D)` each, or of the whole map `(1, N, D)`."""

    def attend(
        self, attention: Any, cut: Cut, selected: WindowPartition, others: tuple[Any, ...]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        (tables,) = others
        merged = merge_tables(tables, selected, cut.windows, cut.joined)
        tap = RotatedTap(places_of(selected, cut.windows, cut.joined).log_size)
        return partial(_run, tap=tap), {self.tables: merged}


class RelativeBlocks(JoinedBlocks):
    """The same with decomposed relative positions."""

    attention = "attn"
    norm = "norm1"

    def attend(
        self, attention: Any, cut: Cut, selected: WindowPartition, others: tuple[Any, ...]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        tap = WindowTap(places_of(selected, cut.windows, cut.joined), partial(self.between, attention))
        return partial(_run, tap=tap), {}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = (
            quietly(attention.qkv, x).unflatten(-1, (3, self.heads(attention), -1)).permute(2, 0, 3, 1, 4)
            for x in (query, key)
        )
        asked, answering = self.normed(attention, queries[0], keys[1])
        logits: Tensor = asked * attention.scale @ answering.transpose(2, 3)
        return logits.squeeze(2)

    def heads(self, attention: Any) -> int:
        """`H`."""
        return int(attention.num_heads)

    def normed(self, attention: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `(B, H, T, D)` as they meet."""
        return query, key

    @abstractmethod
    def between(self, attention: Any, length: int, table: Tensor) -> Tensor:
        """What stands between two of `length` rows, or columns, by a table `(L, D)`: `(length, length, D)`."""


def _run(module: Any, x: Tensor, *, tap: Any, **others: Any) -> Any:
    return module._evo_run(tap, x, **others)
