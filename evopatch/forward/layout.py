"""How the tensors that a host's blocks take hold tokens, and the way there and back."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..algorithm.partition import Partition, merge_positions
from .spec import HostSpec


class Layout:
    """Of one host.

    Args:
        spec: What its adapter says about it.
        stage_of: The stage of each block.
    """

    def __init__(self, spec: HostSpec, stage_of: tuple[int, ...]) -> None:
        self._spec, self._stage_of = spec, stage_of

    def of_block(self, index: int, x: Tensor, ordered: bool = True) -> Tensor:
        """`(B, M, C)` tokens as a block takes them: so, or `(M, B, C)`, or `(B, C, h, w)`; the compact set as one
        column.

        Args:
            index: The block's.
            x: The tokens.
            ordered: Those that stand behind the patch tokens come last. False: the order is no matter, as to attention.
        """
        if self._spec.behind and ordered:
            x = x.roll(-self._spec.behind, 1)
        if self._spec.tokens_first:
            return x.transpose(0, 1)
        if not self._spec.channels_first:
            return x
        assert self._spec.pyramid is not None
        rows, columns = self._spec.pyramid.grids[self._stage_of[index]]
        if x.shape[1] != rows * columns:
            rows, columns = x.shape[1], 1
        channels_first: Tensor = x.transpose(1, 2).unflatten(2, (rows, columns))
        return channels_first

    def given_back(self, index: int, x: Tensor) -> Tensor:
        """The same of what a block gives. Its stage in a pyramid makes a map of it: where only the prefix tokens went
        through the last block, and nothing else is read, there are zeros in the map."""
        if self._spec.pyramid is not None and x.shape[1] == self._spec.prefix:
            rows, columns = self._spec.pyramid.grids[self._stage_of[index]]
            x = F.pad(x, (0, 0, 0, rows * columns))
        return self.of_block(index, x)

    def of_tokens(self, x: Tensor, ordered: bool = True) -> Tensor:
        """The inverse of `of_block`."""
        if self._spec.behind and ordered:
            x = x.roll(self._spec.behind, 1)
        if self._spec.tokens_first:
            return x.transpose(0, 1)
        if not self._spec.channels_first:
            return x
        return x.flatten(2).transpose(1, 2)


def merged_tables(table: Any, partition: Partition, prefix: int, by_image: bool = False) -> Any:
    """Of an input with one entry per token, or a tuple or list of such, that of the compact set; see
    `merge_positions`. With an axis for images it is `(B, N, D)`, without one for heads."""
    if isinstance(table, (tuple, list)):
        return tuple(merge_positions(part, partition, prefix) for part in table)
    if by_image:
        return merge_positions(table.unsqueeze(1), partition, prefix).squeeze(1)
    return merge_positions(table, partition, prefix)
