"""Fit corrections of what tokens receive in windowed blocks, for every block in one pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..algorithm.correction import Regression
from ..algorithm.partition import distances
from ..forward.learned import give_correction
from ..forward.windowed import Received
from ..plan import BlockPlan
from .fitting import AT_ONCE, blocks_of
from .given_images import run_on
from .handle import Patched
from .learning import set_learned

CHANNELS_PER_RANK = 12
"""A block's windows are cut anew, so each has a correction of its own: it has to cost little."""
_SELECTING = BlockPlan(keep_ratio=0.5, selects=True, ends=True, tradeoff=None)
_ALL_TOKENS = BlockPlan(keep_ratio=1.0, selects=False, ends=False, tradeoff=None)


@torch.no_grad()
def fit_window_corrections(model: nn.Module, images: Tensor) -> None:
    """Give every windowed block but the first a correction of what its fast tokens receive.

    It says what a token misses by how far it is from its row, whoever is slow: so it is fitted with half of the tokens
    slow in every block, and serves all settings with matched representatives.

    Args:
        model: A patched model; what its windowed blocks had before is replaced.
        images: `(B, 3, height, width)` as the model expects them, on its device.

    Raises:
        DataError: If tokens aren't finite.
    """
    patched = Patched(model)
    watched = Patched(patched.copy().eval())
    set_learned(watched.model, {})
    names = [name for name, host in patched.hosts.items() if host.state.spec.windowed]
    sums: dict[str, dict[int, Regression]] = {name: {} for name in names}
    for name in names:
        state = watched.hosts[name].state
        state.set_plans((_ALL_TOKENS, *(_SELECTING,) * (state.depth - 1)))
        state.watch = partial(_add, sums[name])
    for batch in images.split(AT_ONCE):
        run_on(watched.model, batch)
    for name in names:
        blocks = blocks_of(patched, patched.hosts[name])
        for index, regression in sums[name].items():
            rank = max(1, regression.channels // CHANNELS_PER_RANK)
            give_correction(blocks[index], index, regression.solve(rank))


def _add(sums: dict[int, Regression], index: int, seen: Received) -> None:
    """What one block's tokens received in one forward."""
    tokens = seen.tokens
    distance = distances(tokens, seen.entry, seen.partition)
    if index not in sums:
        sums[index] = Regression(tokens.shape[-1], tokens.device)
    sums[index].add(distance, seen.alone - seen.out)
