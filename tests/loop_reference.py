"""Matched selection written with Python loops."""

import math
from collections.abc import Sequence

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
