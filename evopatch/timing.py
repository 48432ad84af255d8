"""Speed of a patched model against the unpatched one, alternating in one run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import EvoConfig
from .patch import config_of, restored, set_config


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds."""

    patched: float
    """Images per second."""
    unpatched: float
    """Images per second."""
    ratio: float
    """Median of the rounds' ratios, patched over unpatched: above 1 is faster."""


@torch.no_grad()
def compare_speed(model: nn.Module, batch: Tensor, rounds: int = 5, warm_up: int = 1) -> Speed:
    """Time both sides in turn, so that a machine whose speed drifts slows both alike.

    Args:
        model: A patched model; timed in eval mode, with its first host's configuration.
        batch: Images `(B, 3, height, width)` on the model's device.
        rounds: Timed forwards of each side.
        warm_up: Forwards of each side before.
    """
    config = config_of(model)
    unpatched = EvoConfig(keep_ratio=1.0)
    seconds: dict[EvoConfig, list[float]] = {config: [], unpatched: []}
    with restored(model):
        for step in range(warm_up + rounds):
            for side, times in seconds.items():
                set_config(model, side)
                elapsed = _forward_seconds(model, batch)
                if step >= warm_up:
                    times.append(elapsed)
    pairs = zip(seconds[unpatched], seconds[config], strict=True)
    return Speed(
        patched=len(batch) / statistics.median(seconds[config]),
        unpatched=len(batch) / statistics.median(seconds[unpatched]),
        ratio=statistics.median(slow / fast for slow, fast in pairs),
    )


def _forward_seconds(model: nn.Module, batch: Tensor) -> float:
    _synchronise(batch)
    begin = time.perf_counter()
    model(batch)
    _synchronise(batch)
    return time.perf_counter() - begin


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
