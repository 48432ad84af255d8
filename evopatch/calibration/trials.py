"""One copy of a patched model, run with one setting after another: what it costs, and what it loses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.rows import rounded_share
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
        self._flops: dict[object, float] = {}
        self._grids = patched.host.grids((batch.shape[2], batch.shape[3]))
        self._whole = self._count(UNPATCHED)

    def at(self, config: EvoConfig) -> nn.Module:
        """The model with these settings."""
        self.patched.set_config(config)
        model: nn.Module = self.patched.model
        return model

    def flops(self, config: EvoConfig) -> float:
        """Of the whole model, relative to unpatched."""
        key = self._key(config)
        if key not in self._flops:
            self._flops[key] = self._count(config) / self._whole
        return self._flops[key]

    def _key(self, config: EvoConfig) -> tuple[object, ...]:
        """The same for settings of the same FLOPs: those that keep as many tokens in every block."""
        host = self.patched.host
        plans = host.state.plan(config)
        if host.state.spec.windowed:
            return plans  # how many tokens a window has is known while it runs
        sizes = (rows * columns for rows, columns in self._grids)
        return tuple(
            (plan.selects, plan.keep_ratio == 1.0 or rounded_share(size, plan.keep_ratio))
            for plan, size in zip(plans, sizes, strict=True)
        )

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
        # On a small grid FLOPs go by leaps: the last one below has to do.
        while high - low > 0.03:
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
