"""Speed of a patched model against the unpatched one, alternating in one run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import EvoConfig
from .evaluate import logits_of
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
    with restored(model):
        return _alternate(model, batch, lambda: model(batch), rounds, warm_up)


def compare_training_speed(model: nn.Module, batch: Tensor, rounds: int = 5, warm_up: int = 1) -> Speed:
    """The same for forward and backward in train mode, on a copy of a classifier.

    Args:
        model: A patched classifier of timm or transformers.
        batch: Images `(B, 3, height, width)` on the model's device.
        rounds: Timed steps of each side.
        warm_up: Steps of each side before.
    """
    trained = copy.deepcopy(model).train().requires_grad_(True)

    def step() -> None:
        logits_of(trained(batch)).float().logsumexp(1).sum().backward()
        trained.zero_grad()

    return _alternate(trained, batch, step, rounds, warm_up)


def _alternate(model: nn.Module, batch: Tensor, call: Callable[[], object], rounds: int, warm_up: int) -> Speed:
    config = config_of(model)
    unpatched = EvoConfig(keep_ratio=1.0)
    seconds: dict[EvoConfig, list[float]] = {config: [], unpatched: []}
    for step in range(warm_up + rounds):
        for side, times in seconds.items():
            set_config(model, side)
            elapsed = _seconds(call, batch)
            if step >= warm_up:
                times.append(elapsed)
    pairs = zip(seconds[unpatched], seconds[config], strict=True)
    return Speed(
        patched=len(batch) / statistics.median(seconds[config]),
        unpatched=len(batch) / statistics.median(seconds[unpatched]),
        ratio=statistics.median(slow / fast for slow, fast in pairs),
    )


def _seconds(call: Callable[[], object], batch: Tensor) -> float:
    _synchronise(batch)
    begin = time.perf_counter()
    call()
    _synchronise(batch)
    return time.perf_counter() - begin


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
