"""Fit foresight: what a patched model's blocks rank tokens by, learned from a few images in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.foresight import Regression
from ..config import EvoConfig
from ..errors import DataError, UnsupportedModelError
from ..forward.block import FORESIGHT, SlowFastBlock, foresight_of, layer_norm_of, unwrapped
from ..forward.host_state import HostState
from ..forward.look_ahead import Look
from ..plan import BlockPlan
from .handle import Host, Patched

LEAST_IMAGES = 8
"""Fewer say too little."""
_WATCHED = BlockPlan(keep_ratio=1.0, selects=False, ends=False, tradeoff=1.0)
"""All tokens, and the block's own class attention."""


@torch.no_grad()
def fit_foresight(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give every block of a patched flat model its foresight, by the unpatched model's forwards.

    Args:
        model: A patched model; what its blocks had before is replaced.
        batches: `(B, 3, height, width)` images as the model expects them, on its device; no labels.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If nothing flat is patched in it.
        DataError: If there are fewer than 8 images, or what the model makes of them isn't finite.
    """
    patched = Patched(model)
    hosts = {name: host for name, host in patched.hosts.items() if _is_flat(host)}
    if not hosts:
        raise UnsupportedModelError(
            f"{type(model).__name__}: foresight is for flat models, and what is patched here pools or cuts its tokens "
            "on the way (LeViT, Swin). Leave the images out"
        )
    watched = _watched(patched, hosts)
    sums: dict[str, dict[int, Regression]] = {name: {} for name in hosts}
    count = 0
    for images in batches:
        watched.model(images)
        count += len(images)
        for name in hosts:
            _add(_blocks(watched, watched.hosts[name]), watched.hosts[name].state, sums[name])
    if count < LEAST_IMAGES:
        raise DataError(f"{count} image(s) to fit foresight on: expected at least {LEAST_IMAGES}, better 16 or more")
    for name, host in hosts.items():
        for index, block in enumerate(_blocks(patched, host)):
            if index in sums[name]:
                give_foresight(block, sums[name][index].weights())


def foresight(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a patched model's blocks rank tokens by, by path in the model; empty without foresight."""
    weights = ((name, foresight_of(module)) for name, module in model.named_modules())
    return {name: found for name, found in weights if found is not None}


def set_foresight(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give blocks the foresight that those of another model of the same structure had.

    Raises:
        UnsupportedModelError: If a path isn't a patched block's, or its tokens have other channels; nothing is changed.
    """
    modules = dict(model.named_modules())
    for name, own in weights.items():
        block = modules.get(name)
        if not isinstance(block, SlowFastBlock):
            raise UnsupportedModelError(f"foresight for '{name}', which is no patched block of {type(model).__name__}")
        norm = layer_norm_of(block)
        expected = own.shape if norm is None else tuple(norm.normalized_shape)
        if own.dim() != 1 or tuple(own.shape) != tuple(expected) or not own.isfinite().all():
            raise UnsupportedModelError(
                f"foresight for '{name}' has the shape {tuple(own.shape)}: expected {tuple(expected)}, finite numbers"
            )
    for name, own in weights.items():
        give_foresight(modules[name], own)


def give_foresight(block: nn.Module, weights: Tensor) -> None:
    """Let a patched block rank tokens by these weights, `(C,)`."""
    parameter = next(block.parameters())
    block.register_buffer(FORESIGHT, weights.to(parameter.device, parameter.dtype), persistent=False)


def _blocks(patched: Patched[Any], host: Host) -> list[nn.Module]:
    """A host's patched blocks, also those that a wrapper holds."""
    found: list[Any] = [unwrapped(patched.model.get_submodule(first), SlowFastBlock) for first, *_ in host.blocks()]
    return [block for block in found if block is not None]


def _is_flat(host: Host) -> bool:
    return host.state.spec.pyramid is None and len(host.state.depths) == 1


def _watched(patched: Patched[Any], hosts: Iterable[str]) -> Patched[Any]:
    """A copy whose blocks take all tokens and compute their class attention."""
    watched = Patched(patched.copy().eval())
    watched.set_config(EvoConfig(keep_ratio=1.0, readout=False))
    for name in hosts:
        state = watched.hosts[name].state
        state.plans, state.active, state.passes = (_WATCHED,) * state.depth, True, []
    return watched


def _add(blocks: list[nn.Module], state: HostState, sums: dict[int, Regression]) -> None:
    """What one forward saw."""
    passes, state.passes = state.passes or [], []
    for seen in passes:
        coming: Any = 0.0
        for index in range(seen.depth - 1, 0, -1):
            coming = coming + seen.g[index]
            x = seen.entered[index]
            features = Look(x, {}, seen.spec.prefix, seen.spec.readout).features(blocks[index])
            if index not in sums:
                sums[index] = Regression(features.shape[-1], features.device)
            sums[index].add(features, coming / (seen.depth - index))
