"""A GPU that waits for its host: a patched forward in eager mode launches more than twice as many kernels."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from ..algorithm.rows import exporting
from ..errors import SpeedWarning

ENOUGH = 2**23
"""With fewer numbers in the tokens of a batch than this, a recent GPU is done with each kernel before the next one is
launched (docs/speed.md): 32 images of a ViT-L at 224 px have 6.5 million."""


def warn_if_launches_count(tokens: Tensor) -> None:
    """Once in a program, where a patched model is likely to be slower than unpatched.

    Args:
        tokens: `(B, T, C)`, all that a run of blocks begins with.
    """
    if torch.compiler.is_compiling() or tokens.device.type != "cuda" or tokens.numel() >= ENOUGH or exporting():
        return
    if not torch.cuda.is_current_stream_capturing():
        _say_once()


@cache
def _say_once() -> None:
    warnings.warn(
        "a patched model runs in eager mode on a GPU, on few images at a time. It has twice as many kernels, and hosts "
        "launch them more slowly than recent GPUs run them, so it may be slower than unpatched. Use "
        'torch.compile(model, mode="reduce-overhead") or larger batches, and measure with evopatch.benchmark',
        SpeedWarning,
        stacklevel=2,
    )
