"""The weights of a block that doesn't run now: they may be sharded, offloaded, or of layers that aren't plain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@contextmanager
def at_hand(block: Any) -> Iterator[None]:
    """Bring the weights of a block here that torch's `fully_shard` or accelerate keeps elsewhere."""
    hook = block.__dict__.get("_hf_hook")
    offloaded = getattr(hook, "offload", False)
    try:
        if offloaded:
            hook.pre_forward(block)
        if hasattr(block, "unshard"):
            block.unshard()
        yield
    finally:
        if offloaded:
            hook.post_forward(block, None)
        if hasattr(block, "reshard"):
            block.reshard()


def linear_map(layer: Any, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight `(D, C)` and bias of a linear layer, without a gradient, where and of what type `like` is.

    Args:
        layer: A linear layer, or what took the place of one.
        like: `(B, T, C)`.

    Returns:
        None where they can't be had, as of layers that FullyShardedDataParallel has put away.
    """
    # LoRA and quantised layers; accelerate's hook on the layer itself brings its weight.
    if type(layer) is not nn.Linear or (layer.weight.is_meta and "_old_forward" in layer.__dict__):
        return _probed(layer, like)
    weight, bias = layer.weight, layer.bias
    if is_traceable_wrapper_subclass(weight):
        return None if hasattr(weight, "full_tensor") else _probed(layer, like)
    if weight.shape != (layer.out_features, layer.in_features) or _is_put_away(weight, like):
        return None
    return weight.detach().to(like), None if bias is None else bias.detach().to(like)


@torch.no_grad()
def _probed(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """By what the layer makes of each channel alone."""
    channels = like.shape[-1]
    inputs = torch.eye(channels, channels, device=like.device, dtype=like.dtype)
    out: Tensor = layer(torch.cat([inputs, inputs.new_zeros(1, channels)]).unsqueeze(0))[0]
    return (out[:-1] - out[-1:]).transpose(0, 1), out[-1]


def _is_put_away(weight: Tensor, like: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    if weight.is_meta or like.is_meta:
        return weight.is_meta != like.is_meta
    return weight.untyped_storage().size() == 0
