"""Where runs of blocks begin and what they keep: the settings that are searched, and the steps between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..config import EvoConfig
from ..plan import BlockPlan, shifted

_LOWEST, _HIGHEST = 0.02, 0.98
"""Nothing keeps less; what would keep more keeps all."""
_IMPORTANCE = (0.01, 1.5)


class Schedule(NamedTuple):
    """One setting."""

    firsts: tuple[int, ...]
    """First block of each run, counted from 0."""
    ratios: tuple[float, ...]
    """What each keeps."""
    importance: float
    """See `EvoConfig`."""
    least: tuple[float, ...] = ()
    """What each block has to keep, as `HostState.least` says; empty where that is next to nothing."""

    def config(self, base: EvoConfig) -> EvoConfig:
        """As a configuration, with all else as in another one."""
        kept = self.ratios
        if self.least:
            kept = tuple(max(ratio, self.least[first]) for first, ratio in zip(self.firsts, kept, strict=True))
        return dataclasses.replace(base, stages=self.firsts, keep_ratio=kept, start=None, importance=self.importance)

    def shifted(self, by: float) -> Schedule:
        """Every run keeps more, or less: the odds of its keep ratio times `exp(by)`."""
        return self._replace(ratios=tuple(_moved(ratio, by) for ratio in self.ratios))

    def neighbours(self, step: float, depth: int, fixed: Sequence[int], weighs: bool) -> Iterator[Schedule]:
        """Settings one step away, nearest ideas first.

        Args:
            step: Of the logarithm of a keep ratio's odds.
            depth: How many blocks there are.
            fixed: Blocks that have to begin a run: those that begin a pyramid's stage.
            weighs: Whether `importance` matters.
        """
        firsts, ratios, importance, _ = self
        for run, ratio in enumerate(ratios):
            for by in (step, -step):
                yield self._replace(ratios=(*ratios[:run], _moved(ratio, by), *ratios[run + 1 :]))
        for run, first in enumerate(firsts):
            low = firsts[run - 1] if run else 0
            high = firsts[run + 1] if run + 1 < len(firsts) else depth
            for other in (first - 1, first + 1):
                if low < other < high and first not in fixed:
                    yield self._replace(firsts=(*firsts[:run], other, *firsts[run + 1 :]))
        if weighs:
            for factor in (0.5, 2.0):
                other_importance = min(max(importance * factor, _IMPORTANCE[0]), _IMPORTANCE[1])
                yield self._replace(importance=round(other_importance, 4))
        for run, (first, ratio) in enumerate(zip(firsts, ratios, strict=True)):
            end = firsts[run + 1] if run + 1 < len(firsts) else depth
            if end - first > 1:
                middle, halves = (first + end) // 2, (_moved(ratio, step / 2), _moved(ratio, -step / 2))
                yield self._replace(
                    firsts=(*firsts[: run + 1], middle, *firsts[run + 1 :]),
                    ratios=(*ratios[:run], *halves, *ratios[run + 1 :]),
                )
            if run and first not in fixed:
                yield self._replace(
                    firsts=(*firsts[:run], *firsts[run + 1 :]), ratios=(*ratios[:run], *ratios[run + 1 :])
                )


def schedule_of(
    plans: Sequence[BlockPlan], fixed: Sequence[int], importance: float, least: tuple[float, ...] = ()
) -> Schedule:
    """What a configuration comes to on a model.

    Args:
        plans: One per block.
        fixed: Blocks that begin a pyramid's stage.
        importance: The configuration's.
        least: See `Schedule`.
    """
    firsts: list[int] = []
    for index, plan in enumerate(plans):
        changed = index == 0 or plan.keep_ratio != plans[index - 1].keep_ratio
        if (plan.keep_ratio < 1.0 and (plan.selects or changed)) or (firsts and (index in fixed or changed)):
            firsts.append(index)
    return Schedule(tuple(firsts), tuple(_moved(plans[first].keep_ratio, 0.0) for first in firsts), importance, least)


def _moved(ratio: float, by: float) -> float:
    ratio = min(max(ratio, _LOWEST), _HIGHEST)
    moved = max(round(shifted(ratio, by), 4), _LOWEST)
    return moved if moved < _HIGHEST else 1.0
