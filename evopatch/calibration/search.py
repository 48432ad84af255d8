"""Coordinate search over schedules that all cost the same."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..progress import errors as messages
from ..version import VERSION
from .judge import Judge
from .schedule import Schedule
from .trials import Trials

STEPS = (0.6, 0.3)
"""Of the logarithm of a keep ratio's odds, one after the other."""
_RACED = 16
"""After so many images a setting that is worse than the best by one standard error is given up."""
_SURE = 1.0
"""A setting is taken for better where it is so by as many standard errors: of dozens that are tried on a few images,
one is better by chance."""


class Record:
    """What was tried, in a file: an interrupted search that is begun again knows it.

    Args:
        file: JSON, written after every trial; None: nowhere.
        what: Tells searches apart, by name: one that differs in any starts anew, and says so.
            So does one of another version of evopatch, whose errors may be others.
    """

    def __init__(self, file: Path | None, what: Mapping[str, str] = MappingProxyType({})) -> None:
        self._file, self._what = file, {**what, "version of evopatch": VERSION}
        self._errors: dict[str, list[float]] = {}
        if file is not None and file.exists():
            try:
                content = json.loads(file.read_text())
                tried: dict[str, list[float]] = content["errors"]
                known = dict(content["search"])
                if not isinstance(tried, dict):
                    raise TypeError(f"errors are {tried!r}")
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise CheckpointError(f"{file} is damaged: {error!r}. Remove it to begin anew") from error
            other = [name for name, value in self._what.items() if known.get(name) != value]
            if other:
                text = f"{file} is of a search with another {' and another '.join(other)}: it begins anew"
                messages.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                self._errors = tried

    def __len__(self) -> int:
        return len(self._errors)

    def get(self, key: str) -> Tensor | None:
        """Errors of the images that were looked at, in order."""
        found = self._errors.get(key)
        return None if found is None else torch.tensor(found, dtype=torch.float64)

    def put(self, key: str, errors: Tensor) -> None:
        """Keep them."""
        self._errors[key] = errors.tolist()
        if self._file is not None:
            part = self._file.with_name(f".{self._file.name}.part")
            part.write_text(json.dumps({"search": self._what, "errors": self._errors}))
            os.replace(part, self._file)


class Search:
    """
    Args:
        trials: The model.
        judge: On the images to search on.
        record: What is known.
        budget: Seconds; nothing new is tried after them.
        on_trial: Called after each with the best mean error.
    """

    def __init__(
        self, trials: Trials, judge: Judge, record: Record, budget: float, on_trial: Callable[[float], object]
    ) -> None:
        self._trials, self._judge, self._record = trials, judge, record
        self._budget, self._on_trial = budget, on_trial

    def best(self, start: Schedule, flops: float, depth: int, fixed: Sequence[int], weighs: bool) -> Schedule:
        """The best setting found that costs no more FLOPs; arguments as for `Schedule.neighbours`.

        Args:
            start: At that cost.
            flops: Relative to unpatched.
            depth: How many blocks there are.
            fixed: Blocks that have to begin a run.
            weighs: Whether `importance` matters.
        """
        deadline = time.monotonic() + self._budget
        best, errors = start, self._errors(start, None)
        self._on_trial(float(errors.mean()))
        for step in STEPS:
            improved = True
            while improved:
                improved = False
                for neighbour in best.neighbours(step, depth, fixed, weighs):
                    if time.monotonic() > deadline:
                        return best
                    candidate = self._trials.level(neighbour, flops)
                    if candidate is None or candidate == best:
                        continue
                    own = self._errors(candidate, errors)
                    all_seen = len(own) == len(errors)
                    if all_seen and own.mean() < errors.mean() and clearly_worse(errors, own, by=_SURE):
                        best, errors, improved = candidate, own, True
                    self._on_trial(float(errors.mean()))
                    if improved:
                        break
        return best

    def _errors(self, schedule: Schedule, rival: Tensor | None) -> Tensor:
        """Error of every image, or of the first ones where the setting is clearly worse than a rival."""
        config = schedule.config(self._trials.base)
        key = config.to_json()
        known = self._record.get(key)
        if known is not None and (rival is not None or len(known) == sum(map(len, self._judge.batches))):
            return known
        parts: list[Tensor] = []
        for batch in self._judge.errors(self._trials.at(config)):
            parts.append(batch.error)
            errors = torch.cat(parts)
            if rival is not None and len(errors) >= _RACED and clearly_worse(errors, rival[: len(errors)]):
                break
        self._record.put(key, errors)
        return errors


def clearly_worse(worse: Tensor, better: Tensor, by: float = 1.0) -> bool:
    """Whether errors of the same images are worse by so many standard errors of their mean difference.

    Roots are compared: of KL a few images have the most, and of what they say little can be learned for others.
    """
    difference = worse.sqrt() - better.sqrt()
    return bool(difference.mean() > by * difference.std() / math.sqrt(len(difference)))
