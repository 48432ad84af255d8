"""What blocks learned from images: buffers that go where a block goes, and into no state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.correction import Correction

FORESIGHT, DOWN, UP = BUFFERS = ("_evo_foresight", "_evo_correction_down", "_evo_correction_up")
CORRECTS_FROM = "_evo_corrects_from"
"""An attribute: the first block of the run that a correction is for."""


def foresight_of(module: Any) -> Tensor | None:
    """The weights that a block ranks tokens by, `(C,)`, where it was given some (see `algorithm.foresight`)."""
    weights: Tensor | None = module._buffers.get(FORESIGHT)
    return weights


def correction_of(module: Any, first: int) -> Correction | None:
    """What corrects the restored change of a run that ends with this block, where that was learned for it.

    Args:
        module: A patched block.
        first: Index of the run's first block.
    """
    if module.__dict__.get(CORRECTS_FROM) != first:
        return None
    return Correction(module._buffers[DOWN], module._buffers[UP])


def give(block: nn.Module, name: str, values: Tensor) -> None:
    """Let a patched block have what was learned for it.

    Args:
        block: A patched one.
        name: One of `BUFFERS`.
        values: float32.
    """
    # On the device of an offloaded block, and in the type of a quantised one, nothing would be left of them.
    device = next(block.parameters()).device
    with torch.inference_mode(False):
        kept = values.clone() if values.is_inference() else values  # the first can't take part in training
        block.register_buffer(name, kept if device.type == "meta" else kept.to(device), persistent=False)


def take(block: nn.Module, *names: str) -> None:
    """The inverse of `give`."""
    for name in names:
        block._buffers.pop(name, None)
        block._non_persistent_buffers_set.discard(name)


def give_correction(block: nn.Module, first: int, correction: Correction | None) -> None:
    """Let the last block of a run correct what its tokens receive; None: no more.

    Args:
        block: A patched one.
        first: Index of the run's first block.
        correction: Of the run.
    """
    block.__dict__.pop(CORRECTS_FROM, None)
    take(block, DOWN, UP)
    if correction is not None:
        give(block, DOWN, correction.down)
        give(block, UP, correction.up)
        block.__dict__[CORRECTS_FROM] = first
