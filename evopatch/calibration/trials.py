"""One copy of a patched model, run with one setting after another: what it costs, and what it loses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EvoConfig
from ..measure.profiling import UNPATCHED, count_flops
from ..measure.timing import compare_speed
from ..patching.handle import Patched
from .schedule import Schedule

TOLERANCE = 0.003
"""So much of the FLOPs a setting may lie below the number that is wanted."""


class Trials:
    """
    Args:
        patched: A copy of a patched model; its settings change all the time.
        base: Settings that aren't searched.
        batch: Images `(B, 3, height, width)` to time.
    """

    def __init__(self, patched: Patched[Any], base: EvoConfig, batch: Tensor) -> None:
        self.patched, self.base, self._batch = patched, base, batch
        self._flops: dict[EvoConfig, float] = {}
        self._whole = self._count(UNPATCHED)

    def at(self, config: EvoConfig) -> nn.Module:
        """The model with these settings."""
        self.patched.set_config(config)
        model: nn.Module = self.patched.model
        return model

    def flops(self, config: EvoConfig) -> float:
        """Of the whole model, relative to unpatched."""
        if config not in self._flops:
            self._flops[config] = self._count(config) / self._whole
        return self._flops[config]

    def forget_flops(self) -> None:
        """After something else in the model changed than its settings."""
        self._flops.clear()

    def speed_up(self, config: EvoConfig, rounds: int = 5) -> float:
        """Times as fast as unpatched: the median of alternating rounds."""
        return compare_speed(self.at(config), self._batch, rounds).ratio

    def level(self, schedule: Schedule, flops: float) -> Schedule | None:
        """The setting of the same shape that needs so many FLOPs, or a little less; None: there is none."""
        low, high, shift = -8.0, 8.0, 0.0
        best = None
        for _ in range(12):
            found = schedule.shifted(shift)
            needed = self.flops(found.config(self.base))
            if needed <= flops:
                best, low = found, shift
                if needed >= flops - TOLERANCE:
                    break
            else:
                high = shift
            # About what a whole model's FLOPs grow by with the odds; bisection where that leads out.
            guess = shift + (flops - TOLERANCE / 2 - needed) / 0.15
            shift = guess if low < guess < high else (low + high) / 2
        return best

    def _count(self, config: EvoConfig) -> int:
        with torch.no_grad():
            return count_flops(partial(self.at(config), self._batch[:1]))[0]
