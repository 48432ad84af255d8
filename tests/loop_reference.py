"""Matched selection, and what goes to the next stage of a pyramid, written with Python loops."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def top(values: Sequence[float], count: int) -> set[int]:
    """Indices of the largest values."""
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def matched_reference(g: Tensor, features: Tensor, keep: int, importance: float = 0.7) -> tuple[set[int], list[int]]:
    """One image's groups.

    Args:
        g: Importance `(N,)`.
        features: What tokens are compared by, `(N, C)`, of any length.
        keep: Slow tokens.
        importance: Its exponent.

    Returns:
        The slow tokens, and for every token the slow one that it follows.
    """
    patches = len(g)
    unit = [m / m.norm() for m in features]
    similarity = [[float(unit[i] @ unit[j]) for j in range(patches)] for i in range(patches)]
    loss = []
    for i in range(patches):
        better = [similarity[i][j] for j in range(patches) if g[j] > g[i]]
        loss.append(float(g[i]) ** importance * (1 - max(better)) if better else math.inf)
    slow = sorted(top(loss, keep))
    leader = [i if i in slow else max(slow, key=lambda j: similarity[i][j]) for i in range(patches)]
    return set(slow), leader


def coarser(g: Tensor, grid: tuple[int, int]) -> Tensor:
    """Importance `(N,)` on the next stage's grid: the mean over the 3 by 3 tokens around every second one."""
    rows, columns = grid
    found = []
    for i in range(0, rows, 2):
        for j in range(0, columns, 2):
            near = [g[a * columns + b] for a in range(i - 1, i + 2) for b in range(j - 1, j + 2)
                    if 0 <= a < rows and 0 <= b < columns]  # fmt: skip
            found.append(sum(near) / len(near))
    return torch.stack(found)
