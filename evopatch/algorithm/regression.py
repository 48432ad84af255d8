"""Ridge regression over batches: sums first, the solution after the last batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError


class NormalEquations:
    """Of `D` numbers on `C` others.

    Args:
        inputs: `C`.
        targets: `D`.
        device: Of both.
    """

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self._square = torch.zeros(inputs, inputs, device=device)
        self._product = torch.zeros(inputs, targets, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Rows of one batch, `(M, C)` and `(M, D)`.

        Raises:
            DataError: If either isn't finite.
        """
        with torch.autocast(inputs.device.type, enabled=False):  # sums of squares don't fit half a type
            square, product = inputs.T @ inputs, inputs.T @ targets
        if not (square.isfinite().all() and product.isfinite().all()):
            raise DataError("tokens or their class attention aren't finite on the images given: expected finite ones")
        self._square += square
        self._product += product

    def sides(self, ridge: float) -> tuple[Tensor, Tensor]:
        """`S`, `(C, C)`, and `P`, `(C, D)`, float64, of the equations `S W = P`.

        Args:
            ridge: Added to the diagonal of `S`, relative to its mean.
        """
        square = self._square.double()
        added = ridge * square.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        identity = torch.eye(len(square), dtype=square.dtype, device=square.device)
        return square + added * identity, self._product.double()
