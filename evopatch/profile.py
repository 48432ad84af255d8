"""FLOPs of a patched model against the unpatched one, counted on the real forward, not by a formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import registry
from .config import EvoConfig
from .errors import NotPatchedError
from .ops import num_slow
from .patch import restored, set_config
from .stream import Patch


@dataclass(frozen=True)
class BlockProfile:
    """One block: FLOPs (two per multiply-add) for one image, and the patch tokens that went through one by one."""

    flops: int
    flops_unpatched: int
    tokens: int
    tokens_unpatched: int


@dataclass(frozen=True)
class Profile:
    """One image through a patched model and through the same model unpatched; FLOPs, two per multiply-add."""

    blocks: tuple[BlockProfile, ...]
    flops: int
    """Whole model, selection included."""
    flops_unpatched: int

    @property
    def ratio(self) -> float:
        """FLOPs of the whole model relative to unpatched."""
        return self.flops / self.flops_unpatched

    @property
    def blocks_ratio(self) -> float:
        """FLOPs of the blocks, selection included, relative to unpatched: all but embedding and head."""
        unpatched = sum(block.flops_unpatched for block in self.blocks)
        return (self.flops - self.flops_unpatched + unpatched) / unpatched


def profile(model: nn.Module, input_size: tuple[int, int, int]) -> Profile:
    """Count the FLOPs of one forward, patched and unpatched.

    Args:
        model: A patched host, such as a timm model.
        input_size: `(channels, height, width)` in pixels.

    Raises:
        NotPatchedError: If the model itself is not patched.
    """
    if "_evo_patch" not in model.__dict__:
        raise NotPatchedError(f"{type(model).__name__} is not a patched host: expected a model given to evopatch.apply")
    patch: Patch = model.__dict__["_evo_patch"]
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    plans = patch.plans
    tokens = _patch_tokens(model, image)
    with restored(model):
        flops, blocks = _count(model, image, patch)
        set_config(model, EvoConfig(keep_ratio=1.0))
        flops_unpatched, blocks_unpatched = _count(model, image, patch)
    return Profile(
        blocks=tuple(
            BlockProfile(own, whole, num_slow(tokens, plan.keep_ratio) if plan.keep_ratio < 1.0 else tokens, tokens)
            for own, whole, plan in zip(blocks, blocks_unpatched, plans, strict=False)
        ),
        flops=flops,
        flops_unpatched=flops_unpatched,
    )


def _patch_tokens(model: Any, image: torch.Tensor) -> int:
    adapter = registry.find(model)
    assert adapter is not None
    rows, columns = adapter.grid(model, (image.shape[-2], image.shape[-1]))
    return rows * columns


@torch.no_grad()
def _count(model: nn.Module, image: torch.Tensor, patch: Patch) -> tuple[int, list[int]]:
    with FlopCounterMode(display=False) as counter:
        model(image)
    counts = counter.get_flop_counts()
    root, depth = type(model).__name__, len(getattr(model, patch.spec.blocks))
    blocks = [sum(counts[f"{root}.{patch.spec.blocks}.{i}"].values()) for i in range(depth)]
    return counter.get_total_flops(), blocks
