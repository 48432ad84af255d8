"""Fit corrections of the restored change, run by run, on the patched model's own forwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.correction import Correction, Regression
from ..algorithm.partition import Partition, distribute, merge
from ..forward.block import SlowFastBlock, unwrapped
from ..forward.learned import give_correction
from ..plan import BlockPlan
from .handle import Patched

_AT_ONCE = 16


def runs_of(plans: tuple[BlockPlan, ...]) -> list[tuple[int, int]]:
    """First and last block of every run."""
    firsts = [index for index, plan in enumerate(plans) if plan.selects]
    return [(first, next(i for i in range(first, len(plans)) if plans[i].ends)) for first in firsts]


@torch.no_grad()
def fit_corrections(model: nn.Module, images: Tensor) -> Iterator[tuple[int, int, Correction]]:
    """One correction per run of a patched flat model, each fitted with those before it in place.

    Args:
        model: A patched model with one flat host and matched representatives; left as it is.
        images: `(B, 3, height, width)` as the model expects them, on its device.

    Yields:
        First and last block of the run, and what corrects it. A run whose patch tokens nothing reads has none.

    Raises:
        DataError: If tokens aren't finite.
    """
    short, whole = Patched(Patched(model).copy().eval()), Patched(Patched(model).copy().eval())
    for first, last in runs_of(short.host.state.plans):
        plans = short.host.state.plans
        whole.host.state.set_plans(
            tuple(_all_tokens(plan) if first <= i <= last else plan for i, plan in enumerate(plans))
        )
        whole.host.state.active = True  # also where no other run is left
        regression = None
        for batch in images.split(_AT_ONCE):
            distance, difference = _missed(short, whole, batch, first, last)
            if difference is None:
                break
            regression = regression or Regression(distance.shape[-1], distance.device)
            regression.add(distance, difference)
        if regression is None:
            continue
        correction = regression.solve()
        for patched in (short, whole):
            give_correction(block_at(patched, last), first, correction)
        yield first, last, correction


def _all_tokens(plan: BlockPlan) -> BlockPlan:
    # Later runs may still rank by what these blocks attend to.
    return plan._replace(keep_ratio=1.0, selects=False, ends=False, looks_at=())


def block_at(patched: Patched[Any], index: int) -> nn.Module:
    """The patched block, also one that a wrapper holds."""
    found: Any = unwrapped(patched.model.get_submodule(patched.host.blocks()[index][0]), SlowFastBlock)
    block: nn.Module = found
    return block


def _missed(
    short: Patched[Any], whole: Patched[Any], batch: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor | None]:
    """Tokens' distances from their rows, and what they miss at the end of the run."""
    seen, full = (_forward(patched, batch) for patched in (short, whole))
    x, partition = seen.entered[first], seen.partitions[first]
    given, own = seen.entered[last + 1], full.entered[last + 1]
    rows = _rows(x, partition)
    return x - rows, own - given if given.shape == own.shape == x.shape else None


def _rows(x: Tensor, partition: Partition) -> Tensor:
    """Every token's row."""
    return distribute(torch.zeros_like(x), merge(x, partition), partition)


def _forward(patched: Patched[Any], batch: Tensor) -> Any:
    state = patched.host.state
    state.passes = []
    patched.model(batch)
    (seen,) = state.passes
    return seen
