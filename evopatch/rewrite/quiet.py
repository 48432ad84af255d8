"""Modules outside of their own run: nobody listens, nothing is remembered, and weights are as they would be in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_MAKE_WEIGHTS = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Forward pre-hooks of torch's own that make a module's weights, whenever it is called."""


def quietly(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What a module makes of tokens that are no part of its own run."""
    with unkept():
        if all(map(_is_plain, module.modules())):
            return module.forward(*args, **kwargs)
        return of_copy(module, module.training, *args, **kwargs)


def of_copy(module: Any, training: bool, *args: Any, **kwargs: Any) -> Any:
    """What a quiet copy of a module makes of something; see `quiet_copy`."""
    if not torch.compiler.is_compiling():
        return quiet_copy(module, training).forward(*args, **kwargs)
    # It follows no copies, so the module is for once what a copy would be.
    modules = list(module.modules())
    modes = [inner.training for inner in modules]
    buffers = [(inner, name, b) for inner in modules for name, b in inner._buffers.items() if b is not None]
    try:
        for inner in modules:
            inner.training = training
            _make_weights(inner, inner)
        for inner, name, buffer in buffers:
            inner._buffers[name] = buffer.clone()
        return module.forward(*args, **kwargs)
    finally:
        for inner, mode in zip(modules, modes, strict=True):
            inner.training = mode
        for inner, name, buffer in buffers:
            inner._buffers[name] = buffer


def unkept() -> AbstractContextManager[None]:
    """Inside, nobody keeps weights that are made here for a later call: they may be without a gradient, or of a copy.

    `torch.nn.utils.parametrize.cached` does, and goes by a module's address; so does autocast in older torch (2.6), for
    weights that it casts.
    """
    kept = parametrize._cache_enabled or (torch.is_autocast_cache_enabled() and not torch.is_grad_enabled())
    return _unkept() if kept and not torch.compiler.is_compiling() else nullcontext()


@contextmanager
def _unkept() -> Iterator[None]:
    parametrized, cast = parametrize._cache_enabled, torch.is_autocast_cache_enabled()
    parametrize._cache_enabled = 0
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        parametrize._cache_enabled = parametrized
        torch.set_autocast_cache_enabled(cast)


def at_rest(module: nn.Module) -> Any:
    """A module to read outside of its own run: itself, or a quiet copy where it has something to do before it is
    called."""
    if all(map(_is_plain, module.modules())):
        return module
    if not torch.compiler.is_compiling():
        return quiet_copy(module, module.training)
    # It follows no copies.
    for inner in module.modules():
        _make_weights(inner, inner)
    return module


def quiet_copy(module: Any, training: bool = False) -> Any:
    """A module on the same weights that nobody listens to, and that keeps nothing of what it is run on.

    Args:
        module: Left as it is.
        training: Of the copy. False: no dropout, statistics of batches or observers of quantisation.
    """
    quiet = object.__new__(type(module))
    quiet.__dict__.update(
        module.__dict__,
        training=training,
        _buffers={name: None if b is None else b.clone() for name, b in module._buffers.items()},
        _modules={n: None if m is None else quiet_copy(m, training) for n, m in module._modules.items()},
        _forward_hooks={},
        _forward_pre_hooks={},
    )
    _make_weights(module, quiet)
    return quiet


def _is_plain(module: nn.Module) -> bool:
    remembers = module.training and len(module._buffers) > 0
    return not remembers and not (module._forward_pre_hooks and any(map(_makes_weights, _hooks(module))))


def _hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _makes_weights(hook: object) -> bool:
    return isinstance(hook, _MAKE_WEIGHTS)


def _make_weights(module: nn.Module, target: nn.Module) -> None:
    for hook in filter(_makes_weights, _hooks(module)):
        hook(target, ())
