"""Looking into a patched model: which tokens its blocks updated slowly, and which together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..algorithm.partition import Partition
from ..errors import UnsupportedModelError
from ..forward.host_state import HostState
from .given_images import run_on
from .handle import Patched

Model = TypeVar("Model", bound=nn.Module)


_counting = threading.Lock()


@contextmanager
def full_grid(model: Model) -> Iterator[Model]:
    """Inside, every hook in a patched model sees all tokens, as in the unpatched one.

    Every block takes and returns the full grid in raster order. The modules in a block are called on all tokens, each
    of which shows the value of its group; what hooks change is averaged over the group. So nothing is saved while it is
    on: it is for looking, such as with explainability tools. Without it a forward does the same by itself for blocks
    and modules that somebody's hooks are on, except under `torch.compile`, where hooks see the compact set. Inside the
    attention of windowed blocks (Swin) hooks see the windows of the compact set, also here.

    Args:
        model: A patched model, or one that holds some.

    Yields:
        The model.

    Raises:
        NotPatchedError: If nothing in the model is patched.
    """
    states = [host.state for host in Patched(model).hosts.values()]
    _count(states, 1)
    try:
        yield model
    finally:
        _count(states, -1)


def _count(states: list[HostState], step: int) -> None:
    with _counting:
        for state in states:
            state.full_grid += step


@torch.no_grad()
def token_selection(model: nn.Module, images: Tensor, **model_inputs: Any) -> Tensor:
    """Which patch tokens each block updated slowly, in eval mode.

    The forward runs on a copy of the model on the same weights: whoever runs the model meanwhile notices nothing.

    Args:
        model: A model that takes images and holds one patched host, or is one.
        images: `(B, 3, height, width)`, normalised as the model expects.
        **model_inputs: What else the model's forward takes, such as `interpolate_pos_encoding=True`.

    Returns:
        `(B, L, h, w)` bool for `L` blocks and a grid of `h` by `w` patch tokens. All True where a block takes every
        token, as the blocks before the first selection do. Of a pyramid `h` by `w` is the finest grid, and a token of a
        coarser one is repeated over the place that it stands for.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If several hosts in it are patched, or the one runs several times in a forward; give the
            part that holds one, or runs it once. If nobody knows the grid of the patch tokens.
        DataError: If the model doesn't run on the images.
    """
    return _on_finest_grid([slow for slow, _ in block_maps(model, images, **model_inputs)])


@torch.no_grad()
def token_groups(model: nn.Module, images: Tensor, **model_inputs: Any) -> Tensor:
    """Which patch tokens each block updated together. Arguments and errors as for `token_selection`.

    Returns:
        `(B, L, h, w)` int64: tokens with the same number in a block shared one row of its compact set. All numbers
        differ where a block takes every token.
    """
    return _on_finest_grid([groups for _, groups in block_maps(model, images, **model_inputs)])


@torch.no_grad()
def block_maps(model: nn.Module, images: Tensor, **model_inputs: Any) -> list[tuple[Tensor, Tensor]]:
    """What `token_selection` and `token_groups` give, for every block on its own grid.

    Returns:
        `(B, h, w)` bool and `(B, h, w)` int64 for each block.
    """
    patched = Patched(model)
    partitions = _partitions(patched, images, model_inputs)
    maps = []
    for partition, (height, width) in zip(
        partitions, patched.host.grids((images.shape[-2], images.shape[-1])), strict=False
    ):
        if partition is not None and (found := partition.slow.shape[1]) != height * width:
            raise UnsupportedModelError(
                f"{found} patch tokens came to a block of '{patched.host.name or 'model'}' for images of "
                f"{images.shape[-2]}x{images.shape[-1]} px, of which {height}x{width} were expected: no grid is known "
                "for them. Give images of whole patches and of the model's own size"
            )
        slow = torch.ones(len(images), height * width, dtype=torch.bool, device=images.device)
        groups = torch.arange(height * width, device=images.device).expand(len(images), -1)
        if partition is not None:
            slow, groups = partition.slow, partition.group[:, -height * width :]
        slow, groups = slow.to(images.device), groups.to(images.device)
        maps.append((slow.view(-1, height, width), groups.view(-1, height, width)))
    return maps


def _partitions(patched: Patched[Any], images: Tensor, model_inputs: dict[str, Any]) -> list[Partition | None]:
    """Of every block that is there, None where it takes every token."""
    observed = Patched(patched.copy().eval())
    host = observed.host
    passes: list[Any] = []
    host.state.passes = passes
    run_on(observed.model, images, **model_inputs)
    if len(passes) > 1:
        raise UnsupportedModelError(
            f"'{host.name or type(host.module).__name__}' ran {len(passes)} times in one forward of "
            f"{type(observed.model).__name__}, such as once more for the flipped image: expected once, to say which "
            "tokens were slow. Give the part of the model that runs it once"
        )
    if not passes or not host.state.active:
        return [None] * len(host.blocks())
    return [passes[0].partitions.get(index) for index in range(passes[0].depth)]


def _on_finest_grid(maps: list[Tensor]) -> Tensor:
    """`(B, h, w)` of every block as one `(B, L, h, w)`."""
    height, width = maps[0].shape[1:]
    finest = []
    for coarse in maps:
        row = torch.arange(height, device=coarse.device) * coarse.shape[1] // height
        column = torch.arange(width, device=coarse.device) * coarse.shape[2] // width
        finest.append(coarse[:, row][:, :, column])
    return torch.stack(finest, dim=1)
