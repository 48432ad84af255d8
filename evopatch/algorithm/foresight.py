"""Foresight: a linear guess, from the tokens as they are, of the class attention that is still to come.

What a selection should rank by is the mean class attention of all blocks from the selecting one on. On the unpatched
model it can be observed; over patch tokens its logarithm is nearly linear in the normed token. So ridge regression on a
few images without labels gives `C` numbers per block, and a selection needs one product in place of look-ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .padding import without
from .regression import NormalEquations

# Added to what a logarithm is taken of.
_TINY = 1e-6
# Of the mean of the diagonal.
_RIDGE = 1e-3


def foreseen(tokens: Tensor, weights: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Class attention still to come.

    Args:
        tokens: `(B, N, C)`, normed without weights.
        weights: `(C,)`, see `Regression.weights`.
        left_out: `(B, N)` bool, tokens that a mask leaves out.

    Returns:
        `(B, N)` float32, sums to 1 over each image.
    """
    return without(tokens @ weights, left_out).softmax(dim=-1, dtype=torch.float32)


def _centred(values: Tensor, left_out: Tensor | None) -> Tensor:
    """`(B, N, D)` less its mean over each image; zeros for what is left out."""
    if left_out is None:
        return values - values.mean(1, keepdim=True)
    there = (~left_out).unsqueeze(2).to(values.dtype)
    mean = (values * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1.0)
    return (values - mean) * there


class Regression:
    """Of the logarithm of the class attention still to come on the token: sums over batches, then one solution.

    Over each image both are centred: a selection compares tokens of one image.

    Args:
        channels: `C`.
        device: Of the tokens.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self._equations = NormalEquations(channels, 1, device)

    def add(self, tokens: Tensor, attention: Tensor, left_out: Tensor | None = None) -> None:
        """One batch.

        Args:
            tokens: `(B, N, C)`, normed without weights.
            attention: `(B, N)`, the mean class attention of the block and all after it.
            left_out: `(B, N)` bool, tokens that a mask leaves out: nothing is learned of them.

        Raises:
            DataError: If either isn't finite.
        """
        target = (attention.float() + _TINY).log().unsqueeze(2)
        inputs, targets = (_centred(values, left_out).flatten(0, 1) for values in (tokens.float(), target))
        self._equations.add(inputs, targets)

    def weights(self) -> Tensor:
        """`(C,)` float32."""
        solution: Tensor = torch.linalg.solve(*self._equations.sides(_RIDGE))
        return solution.squeeze(1).float()
