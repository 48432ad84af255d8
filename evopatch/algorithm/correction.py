"""Restored change, corrected: what a token missed by receiving its group's change in place of its own.

A fast token receives the change of its group's row (`partition.distribute`). Its own change, had it gone through the
run's blocks itself, differs from that by what is nearly linear in how far the token is from the row it was merged into.
So ridge regression of that difference on the distance, of low rank, gives two thin matrices per run of blocks. The
distance stays the same through a run, as all tokens of a group receive the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .partition import Partition
from .regression import NormalEquations

RANK = 48
# Of the mean of the diagonal.
_RIDGE = 1e-2


class Correction(NamedTuple):
    """Two thin matrices whose product maps a token's distance from its row to what it missed."""

    down: Tensor
    """`(C, R)`."""
    up: Tensor
    """`(R, C)`."""


def missed(distance: Tensor, partition: Partition, correction: Correction) -> Tensor:
    """What to add to tokens that received the change of their rows.

    Args:
        distance: `(B, T, C)`, of the tokens from their rows, before the run or at its end (`partition.distances`).
        partition: Of the run.
        correction: Of the run.

    Returns:
        `(B, T, C)`, zeros for tokens that are rows of their own, and for those that have none.
    """
    down, up = (matrix.to(distance) for matrix in correction)
    out = distance @ down @ up
    return out if partition.complete else out.masked_fill((partition.group == partition.rows).unsqueeze(2), 0.0)


class Regression:
    """Of what tokens missed on their distance: sums over batches, then one solution.

    Args:
        channels: `C`.
        device: Of the tokens.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.channels = channels
        self._equations = NormalEquations(channels, channels, device)

    def add(self, distance: Tensor, difference: Tensor) -> None:
        """One batch.

        Args:
            distance: `(B, T, C)`, of tokens from their rows.
            difference: `(B, T, C)`, their own change less that of their rows.

        Raises:
            DataError: If either isn't finite.
        """
        self._equations.add(distance.float().flatten(0, 1), difference.float().flatten(0, 1))

    def solve(self, rank: int = RANK) -> Correction:
        """Reduced-rank ridge regression: of all maps of this rank the one that explains most."""
        square, product = self._equations.sides(_RIDGE)
        root = torch.linalg.cholesky(square)
        # With `S = L L^T` the full solution is `L^-T L^-1 P`; its best approximation projects what it explains,
        # `L^-1 P`, onto the directions in which that is largest.
        explained = torch.linalg.solve_triangular(root, product, upper=False)
        directions = torch.linalg.svd(explained, full_matrices=False).Vh[: min(rank, len(square))]
        down = torch.linalg.solve_triangular(root.T, explained @ directions.T, upper=True)
        return Correction(down.float().contiguous(), directions.float().contiguous())
