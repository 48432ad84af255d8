"""The weights of a block that doesn't run now: they may be sharded, offloaded, or of layers that aren't plain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@contextmanager
def at_hand(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Bring the weights of modules here that torch's `fully_shard` or accelerate keeps elsewhere.

    Args:
        modules: None of which runs now.
    """
    with ExitStack() as stack:
        for module in modules:
            if "_hf_hook" in module.__dict__:
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
            if hasattr(type(module), "unshard"):
                sharded: Any = module
                sharded.unshard()
                stack.callback(sharded.reshard)
        yield


def linear_map(layer: Any, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight `(D, C)` and bias of a linear layer, without a gradient, where and of what type `like` is.

    Args:
        layer: A linear layer, or what took the place of one.
        like: `(B, T, C)`.

    Returns:
        None where they can't be had, as of layers that FullyShardedDataParallel has put away.
    """
    if type(layer) is not nn.Linear:  # LoRA and quantised layers
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
