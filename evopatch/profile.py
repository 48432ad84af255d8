"""FLOPs of a patched model against the unpatched one, counted on the real forward, not by a formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import EvoConfig
from .ops import num_slow
from .patch import adapter_of, only_host, restored, set_config
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
        model: A model that takes images and holds one patched host, or is one.
        input_size: `(channels, height, width)` in pixels.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If several hosts in it are patched.
    """
    name, host = only_host(model)
    patch: Patch = host._evo_patch
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    plans = patch.plans
    rows, columns = adapter_of(host).grid(host, (image.shape[-2], image.shape[-1]))
    tokens = rows * columns
    container = ".".join(filter(None, (name, patch.spec.blocks)))
    with restored(model):
        flops, blocks = _count(model, image, container)
        set_config(model, EvoConfig(keep_ratio=1.0))
        flops_unpatched, blocks_unpatched = _count(model, image, container)
    return Profile(
        blocks=tuple(
            BlockProfile(own, whole, num_slow(tokens, plan.keep_ratio) if plan.keep_ratio < 1.0 else tokens, tokens)
            for own, whole, plan in zip(blocks, blocks_unpatched, plans, strict=False)
        ),
        flops=flops,
        flops_unpatched=flops_unpatched,
    )


@torch.no_grad()
def _count(model: nn.Module, image: torch.Tensor, container: str) -> tuple[int, list[int]]:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, a quarter of a second

    with FlopCounterMode(display=False) as counter:
        model(image)
    counts = counter.get_flop_counts()
    blocks_module: Any = model.get_submodule(container)
    root = type(model).__name__
    blocks = [sum(counts[f"{root}.{container}.{i}"].values()) for i in range(len(blocks_module))]
    return counter.get_total_flops(), blocks
