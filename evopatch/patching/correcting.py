"""Fit corrections of the restored change on the patched model's own forwards, one run after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.correction import Correction, Regression
from ..algorithm.partition import distances, merge
from ..plan import BlockPlan
from .fitting import AT_ONCE
from .given_images import run_on
from .handle import Patched


def runs_of(plans: tuple[BlockPlan, ...]) -> list[tuple[int, int]]:
    """First and last block of every run."""
    firsts = [index for index, plan in enumerate(plans) if plan.selects]
    return [(first, next(i for i in range(first, len(plans)) if plans[i].ends)) for first in firsts]


@torch.no_grad()
def fit_correction(model: nn.Module, images: Tensor, first: int, last: int) -> Correction | None:
    """What corrects one run of a patched flat model, with the corrections of earlier runs that it has.

    Args:
        model: A patched model with one flat host and matched representatives; left as it is.
        images: `(B, 3, height, width)` as the model expects them, on its device.
        first: The run's first block.
        last: Its last one.

    Returns:
        None for a run whose patch tokens nothing reads.

    Raises:
        DataError: If tokens aren't finite.
    """
    short, whole = (Patched(Patched(model).copy().eval()) for _ in range(2))
    plans = enumerate(short.host.state.plans)
    whole.host.state.set_plans(tuple(_all_tokens(plan) if first <= i <= last else plan for i, plan in plans))
    regression = None
    for batch in images.split(AT_ONCE):
        distance, difference = _missed(short, whole, batch, first, last)
        if difference is None:
            return None
        regression = regression or Regression(distance.shape[-1], distance.device)
        regression.add(distance, difference)
    return None if regression is None else regression.solve()


def _all_tokens(plan: BlockPlan) -> BlockPlan:
    # Later runs may still rank by what these blocks attend to.
    return plan._replace(keep_ratio=1.0, selects=False, ends=False, looks_at=())


def _missed(
    short: Patched[Any], whole: Patched[Any], batch: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor | None]:
    """Tokens' distances from their rows, and what they miss at the end of the run."""
    seen, full = (_forward(patched, batch) for patched in (short, whole))
    x, partition = seen.entered[first], seen.partitions[first]
    given, own = seen.entered[last + 1], full.entered[last + 1]
    if not given.shape == own.shape == x.shape:
        return x, None
    distance, difference = distances(x, merge(x, partition), partition), own - given
    if partition.complete:
        return distance, difference
    stays = (partition.group == partition.rows).unsqueeze(2)  # a mask leaves it out
    return distance.masked_fill(stays, 0.0), difference.masked_fill(stays, 0.0)


def _forward(patched: Patched[Any], batch: Tensor) -> Any:
    state = patched.host.state
    state.passes = []
    run_on(patched.model, batch)
    (seen,) = state.passes
    return seen
