"""Runs of blocks that make a model slower rather than faster, on one device and at one batch size, are left alone."""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..alternating import alternate
from ..config import EvoConfig
from .given_images import run_on
from .handle import Patched

Model = TypeVar("Model", bound=nn.Module)

_SECONDS = 2.0
_ROUNDS = (7, 40)
"""At least and at most so many forwards of each side, and between them as many as take about `_SECONDS`."""


@torch.no_grad()
def skip_slow_runs(model: nn.Module, images: Tensor) -> None:
    """Let the blocks of every run that doesn't make a patched model faster take all tokens.

    Each run is timed against the model without it, alternating, in eval mode; what is left at last against the model
    that keeps all tokens.

    Args:
        model: A patched model; its configuration names its runs afterwards, with a keep ratio for each.
        images: `(B, 3, height, width)` as the model expects them, on its device, as many as in a batch.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        DataError: If the model doesn't run on the images.
    """
    patched = Patched(model)
    for name in patched.hosts:
        _skip(patched, name, images)


def _skip(patched: Patched[Any], name: str, images: Tensor) -> None:
    host = patched.hosts[name]
    config = host.state.written_out()
    ratios = _ratios(config)
    for run, ratio in enumerate(ratios):
        without = (*ratios[:run], 1.0, *ratios[run + 1 :])
        if ratio < 1.0 and not _is_faster(patched, name, config, ratios, without, images):
            ratios = without
    whole = (1.0,) * len(ratios)
    if ratios != whole and not _is_faster(patched, name, config, ratios, whole, images):
        ratios = whole
    if ratios != _ratios(config):
        host.state.set_config(dataclasses.replace(config, keep_ratio=ratios))


def _ratios(config: EvoConfig) -> tuple[float, ...]:
    ratios = config.keep_ratio
    assert isinstance(ratios, tuple)
    return ratios


def _is_faster(
    patched: Patched[Any],
    name: str,
    config: EvoConfig,
    ratios: tuple[float, ...],
    others: tuple[float, ...],
    images: Tensor,
) -> bool:
    """Whether one host with these keep ratios makes the model faster than with the others."""
    calls = {}
    for side in (ratios, others):
        copied = patched.copy().eval()
        Patched(copied).hosts[name].state.set_config(dataclasses.replace(config, keep_ratio=side))
        calls[side] = partial(run_on, copied, images)
    once = alternate(calls, images.device, rounds=1)
    rounds = round(_SECONDS / sum(map(sum, once.values())))
    seconds = alternate(calls, images.device, min(max(rounds, _ROUNDS[0]), _ROUNDS[1]))
    return statistics.median(b / a for a, b in zip(seconds[ratios], seconds[others], strict=True)) > 1.0
