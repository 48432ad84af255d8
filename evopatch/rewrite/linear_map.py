"""The weights of a block that doesn't run now: they may be sharded, offloaded, or of layers that aren't plain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.rows import exporting, in_forward_mode
from .quiet import at_rest, of_copy, unkept


def at_hand(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Bring the weights of modules here that torch's `fully_shard` or accelerate keeps elsewhere.

    Args:
        modules: None of which runs now.
    """
    away = [module for module in modules if _is_kept_elsewhere(module)]
    return _brought(away) if away else nullcontext()


def _is_kept_elsewhere(module: nn.Module) -> bool:
    return "_hf_hook" in module.__dict__ or hasattr(type(module), "unshard")


@contextmanager
def _brought(modules: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            if "_hf_hook" in module.__dict__:
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
            if hasattr(type(module), "unshard"):
                sharded: Any = module
                sharded.unshard()
                stack.callback(sharded.reshard)
        yield


def along(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on the way from one, which counts, to one inside it, which does, too."""
    yield module
    for name in path.split(".") if path else ():
        module = getattr(module, name)
        yield module


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
    layer = at_rest(layer)
    if not _is_here(layer) or layer.weight.is_meta != like.is_meta:
        return None
    if _wraps(layer.weight):
        return _probed(layer, like)
    return given(layer.weight, like), None if layer.bias is None else given(layer.bias, like)


def can_be_had(layer: Any, way: Iterable[nn.Module]) -> bool:
    """Whether `linear_map` will find a layer's weights, inside `at_hand`.

    Args:
        layer: A linear layer, or what took the place of one.
        way: The modules that `at_hand` is given.
    """
    if type(layer) is not nn.Linear or _is_here(layer):
        return True
    return not torch.compiler.is_compiling() and any(map(_is_kept_elsewhere, way))


def parameter_map(module: nn.Module, weight: str, bias: str, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """As `linear_map`, of a module that holds weight and bias of a linear layer itself, as `nn.MultiheadAttention`.

    Args:
        module: It.
        weight: Name of its parameter `(D, C)`.
        bias: Name of its parameter `(D,)`; `""` where it has none.
        like: `(B, T, C)`.
    """
    module = at_rest(module)
    matrix, offset = getattr(module, weight), getattr(module, bias) if bias else None
    wrapped = _wraps(matrix)
    if wrapped or matrix.dim() != 2 or not _is_filled(matrix) or matrix.is_meta != like.is_meta:
        return None
    return given(matrix, like), None if offset is None else given(offset, like)


def parameter_can_be_had(module: nn.Module, weight: str, way: Iterable[nn.Module]) -> bool:
    """Whether `parameter_map` will find a module's weights, inside `at_hand` of the modules `way`."""
    matrix = getattr(module, weight)
    return comes_here([matrix] if matrix.dim() == 2 else [], way)


def is_here(parameters: Iterable[Tensor | None]) -> bool:
    """Whether these are plain tensors with values."""
    return all(p is None or (not _wraps(p) and _is_filled(p)) for p in parameters)


def comes_here(parameters: Iterable[Tensor | None], way: Iterable[nn.Module]) -> bool:
    """Whether they will be inside `at_hand` of the modules `way`."""
    return is_here(parameters) or (not torch.compiler.is_compiling() and any(map(_is_kept_elsewhere, way)))


def _is_here(layer: nn.Linear) -> bool:
    weight = layer.weight
    if _wraps(weight):
        return not hasattr(type(weight), "full_tensor")  # of a DTensor a part is here
    return weight.shape == (layer.out_features, layer.in_features) and _is_filled(weight)


def _wraps(tensor: Tensor) -> bool:
    """Whether it holds others, as quantised and sharded weights do. By its class, which torch.compile sees, too."""
    return hasattr(type(tensor), "__tensor_flatten__")


def _is_filled(weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or weight.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(weight):
        return True  # those of torch.func have no storage to ask for
    return weight.untyped_storage().size() > 0


def given(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter without a gradient, of the type and on the device of `like`: itself where it is so, as at batch 1
    every operator counts."""
    # A trace is checked by another one, made without gradients: both have to record the same.
    if in_forward_mode() or (parameter.requires_grad and (torch.is_grad_enabled() or exporting())):
        parameter = parameter.detach()
    same = parameter.dtype == like.dtype and parameter.device == like.device
    return parameter if same else parameter.to(like)


@torch.no_grad()
def _probed(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """By what the layer makes of each channel alone."""
    channels = like.shape[-1]
    inputs = torch.eye(channels, channels, device=like.device, dtype=like.dtype)
    with unkept():
        out: Tensor = of_copy(layer, False, torch.cat([inputs, inputs.new_zeros(1, channels)]).unsqueeze(0))[0]
    return (out[:-1] - out[-1:]).transpose(0, 1), out[-1]
