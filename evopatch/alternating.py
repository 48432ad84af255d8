"""Times of several calls, alternating in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def alternate(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int = 1,
    on_round: Callable[[], object] = lambda: None,
) -> dict[Key, list[float]]:
    """Time calls in turn, so that a machine whose speed drifts slows all of them alike.

    Args:
        calls: What to time, by name.
        device: Waited for before and after each call.
        rounds: Timed calls of each.
        warm_up: Calls of each before.
        on_round: Called after each round, the warm-up's included.

    Returns:
        Seconds, one entry per round.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for step in range(warm_up + rounds):
        for key, call in calls.items():
            _synchronise(device)
            begin = time.perf_counter()
            call()
            _synchronise(device)
            if step >= warm_up:
                seconds[key].append(time.perf_counter() - begin)
        on_round()
    return seconds


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
