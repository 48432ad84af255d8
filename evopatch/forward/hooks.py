"""Hooks that want to see every token: whose they are, and what shows them the full grid inside a block.

Inside a run a block works on the compact set. A hook that somebody registered to look at tokens would see fewer of
them, so a forward pass that meets one lets every block take and return the full grid, and calls the hooked modules of a
block on all tokens: each token shows the value of its row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithm.partition import Partition, merge, spread_attention, unspread_attention

# Their hooks shard, offload, record or reparametrise: they don't look at single tokens, or ask for the full grid.
_OWN_WAYS = {"torch", "transformers", "accelerate", "deepspeed", "evopatch"}


def wants_tokens(module: nn.Module) -> bool:
    """Whether somebody's hook on a module, or on one in it, may look at tokens."""
    # Of every module at every forward, so not by properties or generators.
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        for hook in _hooks(module):
            if _is_foreign(hook):
                return True
    for child in own["_modules"].values():  # noqa: SIM110
        if child is not None and wants_tokens(child):
            return True
    return False


def _hooks(module: nn.Module) -> list[Any]:
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for kind in kinds for hook in kind.values()]


def _is_foreign(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return str(origin).partition(".")[0] not in _OWN_WAYS


class FullGrid:
    """Shows modules inside a block all tokens while the block works on a compact set.

    Args:
        everything: For every module, not only for those with hooks.
        partition: Of the block's run.
        grid: Rows and columns where tokens lie in an image's layout, `(B, C, h, w)` or `(B, h, w, C)`.
    """

    def __init__(self, everything: bool, partition: Partition, grid: tuple[int, int] | None) -> None:
        self._everything = everything
        self._partition = partition
        self._grid = grid

    def wants(self, module: nn.Module) -> bool:
        """Whether to call this module on all tokens."""
        return self._everything or wants_tokens(module)

    def around(self, module: Any) -> Shown:
        """What stands for the module: takes and returns the compact set, calls the module on all tokens."""
        return Shown(module, self)

    def inside(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The inverse: `run(module, ...)` on the compact set, of a module that is called on all tokens."""

        def on_all_tokens(module: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = {name: self.hide(value) for name, value in kwargs.items()}
            return self.show(run(module, *map(self.hide, args), **hidden))

        return on_all_tokens

    def show(self, x: Any) -> Any:
        """From the compact set to all tokens: tensors of a layout with tokens, and tuples of such; anything else as it
        is."""
        return tuple(map(self.show, x)) if type(x) is tuple else self._show(x)

    def hide(self, x: Any) -> Any:
        """The inverse of `show`."""
        return tuple(map(self.hide, x)) if type(x) is tuple else self._hide(x)

    def _show(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 3:
            return x
        partition, rows = self._partition, self._partition.rows
        tokens = partition.group.shape[1]
        if x.dim() == 3 and x.shape[1] == rows:
            return _spread(x, partition)
        if x.dim() != 4:
            return x
        if self._grid is not None and x.shape[1:3] == (rows, 1):  # (B, M, 1, C), Swin's
            return _spread(x.flatten(1, 2), partition).unflatten(1, self._grid)
        if self._grid is not None and x.shape[2:] == (rows, 1):  # (B, C, M, 1), convolutional LeViT's
            return _spread(x.flatten(2).transpose(1, 2), partition).transpose(1, 2).unflatten(2, self._grid)
        if x.shape[2:] == (rows, rows):
            return spread_attention(x, partition)
        if x.shape[2] == rows:  # (B, H, M, D)
            batch, heads, _, channels = x.shape
            full = _spread(x.transpose(1, 2).reshape(batch, rows, heads * channels), partition)
            return full.view(batch, tokens, heads, channels).transpose(1, 2)
        return x

    def _hide(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 3:
            return x
        partition, tokens = self._partition, self._partition.group.shape[1]
        if x.dim() == 3 and x.shape[1] == tokens:
            return merge(x, partition)
        if x.dim() != 4:
            return x
        if self._grid is not None and x.shape[1:3] == self._grid:
            return merge(x.flatten(1, 2), partition).unsqueeze(2)
        if self._grid is not None and x.shape[2:] == self._grid:
            return merge(x.flatten(2).transpose(1, 2), partition).transpose(1, 2).unsqueeze(3)
        if x.shape[2:] == (tokens, tokens):
            return unspread_attention(x, partition)
        if x.shape[2] == tokens:
            batch, heads, _, channels = x.shape
            compact = merge(x.transpose(1, 2).reshape(batch, tokens, heads * channels), partition)
            return compact.view(batch, -1, heads, channels).transpose(1, 2)
        return x


class Shown:
    """Stands for a module that somebody wants to see all tokens in."""

    def __init__(self, module: Any, full_grid: FullGrid) -> None:
        self._evo_module = module
        self._evo_full_grid = full_grid

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        show, hide = self._evo_full_grid.show, self._evo_full_grid.hide
        return hide(self._evo_module(*map(show, args), **{name: show(value) for name, value in kwargs.items()}))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_evo_module"], name)


def _spread(x: Tensor, partition: Partition) -> Tensor:
    """`(B, M, C)` to `(B, T, C)`: every token the value of its row; zeros where nothing stands in for it."""
    if not partition.complete:
        x = F.pad(x, (0, 0, 0, 1))
    return torch.take_along_dim(x, partition.group.unsqueeze(-1), dim=1)
