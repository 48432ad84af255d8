"""All that a patched model's blocks learned from images, to be saved, and given to another model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..algorithm.correction import Correction
from ..errors import UnsupportedModelError
from ..forward.block import SlowFastBlock, layer_norm_of
from ..forward.guarded import GuardedBlock
from ..forward.learned import CORRECTS_FROM, correction_of, foresight_of, give, give_correction, take
from ..forward.learned import FORESIGHT as _FORESIGHT

# Foresight goes by the block's path alone; a correction's matrices are named beside it, with the run's first block.
_CORRECTION = re.compile(r"(?P<path>.+)\|from (?P<first>\d+)\|(?P<part>down|up)")


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Tensors by name; empty where nothing was learned."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        weights = foresight_of(module)
        if weights is not None:
            found[path] = weights
        if (first := module.__dict__.get(CORRECTS_FROM)) is not None:
            correction = correction_of(module, first)
            assert correction is not None
            found |= {f"{path}|from {first}|{part}": matrix for part, matrix in correction._asdict().items()}
    return found


def set_learned(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model's blocks what those of another of the same structure learned, and nothing else.

    Raises:
        UnsupportedModelError: If a name isn't a patched block's, or a tensor doesn't fit it; nothing is changed.
    """
    modules = dict(model.named_modules())
    foresight: dict[str, Tensor] = {}
    corrections: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _CORRECTION.fullmatch(name):
            corrections.setdefault((match["path"], int(match["first"])), {})[match["part"]] = tensor
        else:
            foresight[name] = tensor
    for path, weights in foresight.items():
        _check(model, modules.get(path), path, "foresight", weights, 0, dims=1)
    for (path, first), parts in corrections.items():
        down, up = parts.get("down"), parts.get("up")
        if down is None or up is None or down.shape[::-1] != up.shape:
            raise UnsupportedModelError(f"a correction for '{path}' lacks a part, or its parts don't fit each other")
        _check(model, modules.get(path), path, f"a correction from block {first} on", down, 0, dims=2)
        _check(model, modules.get(path), path, f"a correction from block {first} on", up, 1, dims=2)
    for module in modules.values():
        take(module, _FORESIGHT)
        give_correction(module, 0, None)
    for path, weights in foresight.items():
        give(modules[path], _FORESIGHT, weights)
    for (path, first), parts in corrections.items():
        give_correction(modules[path], first, Correction(parts["down"], parts["up"]))


def _check(model: nn.Module, block: Any, path: str, what: str, tensor: Tensor, axis: int, dims: int) -> None:
    if not isinstance(block, GuardedBlock):
        raise UnsupportedModelError(f"{what} for '{path}', which is no patched block of {type(model).__name__}")
    norm = layer_norm_of(block) if isinstance(block, SlowFastBlock) else None
    channels = tensor.shape[axis] if norm is None or tensor.dim() <= axis else norm.normalized_shape[0]
    if tensor.dim() != dims or tensor.shape[axis] != channels or not tensor.isfinite().all():
        raise UnsupportedModelError(
            f"{what} for '{path}' has the shape {tuple(tensor.shape)}: expected "
            + (f"({channels},)" if dims == 1 else f"{channels} channels")
            + ", finite numbers"
        )
