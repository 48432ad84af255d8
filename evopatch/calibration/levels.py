"""The FLOPs at which a target is reached."""

from __future__ import annotations

from ..errors import ConfigError
from .judge import Judge
from .outcome import Point
from .schedule import Schedule
from .target import Target
from .trials import Trials

_LEAST, _MOST = 0.2, 0.97
_WHOLE = 8.0
"""Odds shifted by so much are those of next to no slow tokens, or of all."""
_SPEED_MARGIN = 0.01
"""A speed-up is aimed at by so much more, as another process measures another one."""


def level_of(trials: Trials, schedule: Schedule, flops: float) -> Schedule:
    """`Trials.level`, or an error.

    Raises:
        ConfigError: If nothing of that shape needs so few FLOPs.
    """
    found = trials.level(schedule, flops)
    if found is None:
        least = trials.flops(schedule.shifted(-_WHOLE).config(trials.base))
        raise ConfigError(
            f"{flops:.3f} of the FLOPs can't be reached: at least {least:.3f} are needed with runs from block "
            f"{schedule.firsts[0]} on. Begin with a configuration that starts earlier"
        )
    return found


def nearest(trials: Trials, schedule: Schedule, flops: float) -> Schedule:
    """`Trials.level`, or what needs the fewest FLOPs of that shape."""
    return trials.level(schedule, flops) or schedule.shifted(-_WHOLE)


def is_reached(target: Target, after: Point) -> bool:
    """Whether a setting is at the target, by its figures on the images to report on."""
    if target.kind == "agreement":
        assert after.agreement is not None
        return after.agreement >= target.value
    if target.kind == "speedup":
        return after.speed_up >= 0.97 * target.value
    return (after.flops if target.kind == "flops" else after.error) <= target.value


class Levels:
    """
    Args:
        trials: The model.
        judge: On the images to search on.
        target: What is to be reached.
    """

    def __init__(self, trials: Trials, judge: Judge, target: Target) -> None:
        self._trials, self._judge, self._target = trials, judge, target

    def first(self, start: Schedule) -> float:
        """The FLOPs to search at: where the settings to begin with are at the target."""
        if self._target.kind == "flops":
            return self._target.value
        if self._target.kind == "speedup":
            return self._at_speed(start, 1.0 / self._target.value)[1]
        return self._at_loss(start)[1]

    def reached(self, best: Schedule, flops: float) -> tuple[Schedule, float]:
        """What was found at these FLOPs, at the target; and the FLOPs then."""
        if self._target.kind == "flops":
            return best, flops
        return self._at_speed(best, flops) if self._target.kind == "speedup" else self._at_loss(best)

    def _at_speed(self, schedule: Schedule, flops: float) -> tuple[Schedule, float]:
        """Where the measured speed-up is the target, or a little more; the last that was tried where it isn't
        reached."""
        wanted, found = self._target.value * (1.0 + _SPEED_MARGIN), schedule
        for _ in range(6):
            level = self._trials.level(schedule, flops)
            if level is None:
                found = schedule.shifted(-_WHOLE)
                return found, self._trials.flops(found.config(self._trials.base))
            found = level
            speed = self._trials.speed_up(found.config(self._trials.base), rounds=9)
            if self._target.value <= speed <= wanted * (1.0 + _SPEED_MARGIN):
                break
            # The time saved is nearly proportional to the FLOPs left out.
            saved = (1.0 - 1.0 / wanted) / max(0.01, 1.0 - 1.0 / speed)
            flops = min(_MOST, max(_LEAST, 1.0 - (1.0 - flops) * min(2.0, max(0.5, saved))))
        return found, flops

    def _at_loss(self, schedule: Schedule) -> tuple[Schedule, float]:
        """The fewest FLOPs at which the images to search on lose no more than the target."""
        low, high, found = _LEAST, _MOST, schedule.shifted(_WHOLE)
        while high - low > 0.01:
            middle = (low + high) / 2
            level = self._trials.level(schedule, middle)
            if level is not None and self._holds(level):
                found, high = level, middle
            else:
                low = middle
        return found, high

    def _holds(self, schedule: Schedule) -> bool:
        errors = self._judge.all_errors(self._trials.at(schedule.config(self._trials.base)))
        if self._target.kind == "kl":
            return float(errors.error.mean()) <= self._target.value
        assert errors.agrees is not None
        return float(errors.agrees.double().mean()) >= self._target.value
