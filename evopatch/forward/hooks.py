"""Hooks that want to see every token: whose they are, and what shows them the full grid inside a block.

Inside a run a block works on the compact set. A hook that somebody registered to look at tokens would see fewer of
them, so a forward pass that meets one lets every block take and return the full grid, and calls the hooked modules of a
block on all tokens: each token shows the value of its row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithm.partition import Partition, merge, merge_pairs, spread_attention, spread_pairs, unspread_attention
from ..rewrite.fast_paths import is_multihead
from ..rewrite.view import Call
from .spec import HostSpec

# Their hooks shard, offload, record or reparametrise: they don't look at single tokens, or ask for the full grid.
_OWN_WAYS = {"torch", "transformers", "accelerate", "deepspeed", "evopatch"}


def wants_tokens(module: nn.Module) -> bool:
    """Whether somebody's hook on a module, or on one in it, may look at tokens."""
    # Of every module at every forward, so not by properties or generators.
    own = module.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooked and has_foreign_hooks(module):
        return True
    for child in own["_modules"].values():  # noqa: SIM110
        if child is not None and wants_tokens(child):
            return True
    return False


def has_foreign_hooks(module: nn.Module) -> bool:
    """The same of a module alone."""
    return any(map(_is_foreign, _hooks(module)))


def is_recomputed(module: nn.Module) -> bool:
    """Whether hooks of a module compute it anew in backward (torch's composable checkpoints)."""
    return any("checkpoint" in _origin(hook) for hook in _hooks(module))


def _hooks(module: nn.Module) -> list[Any]:
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for kind in kinds for hook in kind.values()]


def _is_foreign(hook: Any) -> bool:
    return _origin(hook).partition(".")[0] not in _OWN_WAYS


def _origin(hook: Any) -> str:
    """The module that a hook is from."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


class FullGrid:
    """Shows modules inside a block all tokens while the block works on a compact set.

    Args:
        everything: For every module, not only for those with hooks.
        partition: Of the block's run.
        grid: Rows and columns where tokens lie in an image's layout, `(B, C, h, w)` or `(B, h, w, C)`.
        spec: The host's. Tensors of three axes are `(M, B, C)` with `tokens_first`, some hold `joined` entries of the
            batch one after the other, or `appended` rows behind all others, and with layers that are `mixing` heads
            weights are those of one token.
        maps: Whether `(B, H, M, M)` is attention between tokens; else `M` channels of every token.
    """

    def __init__(
        self,
        everything: bool,
        partition: Partition,
        grid: tuple[int, int] | None,
        spec: HostSpec,
        maps: bool = True,
    ) -> None:
        self._everything = everything
        self._partition = partition
        self._grid = grid
        self._maps = maps
        self._tokens_first = spec.tokens_first
        self._mixes = bool(spec.trace.mixing)
        self._other: FullGrid | None = None
        """Of tensors with other tokens than the block's: those of several windows together, or more of them."""
        if spec.joined > 1 or spec.appended:
            other = partition.joined(spec.joined) if spec.joined > 1 else partition.appended(spec.appended)
            alone = dataclasses.replace(spec, joined=1, appended=0)
            self._other = FullGrid(everything, other, grid, alone, maps)

    def wants(self, module: nn.Module) -> bool:
        """Whether to call this module on all tokens."""
        return self._everything or wants_tokens(module)

    def around(self, module: Any) -> Shown:
        """What stands for the module: takes and returns the compact set, calls the module on all tokens."""
        # A compact set may have as many rows as a head has channels; norms work on those.
        normalises = isinstance(module, nn.Identity) or "norm" in type(module).__name__.lower()
        shown = copy(self)
        shown._maps = self._maps and not normalises
        shown._other = None if self._other is None else self._other.around(module)._evo_full_grid
        return Shown(module, shown)

    def around_run(self, module: Any, run: Callable[..., Any]) -> Shown:
        """The same for a `Steered` module that works on a compact set: its hooks see all tokens.

        Args:
            module: The module.
            run: What it is to run; its first argument are the tokens, all others are for all tokens anyway.
        """

        # Self-attention of torch is given its tokens three times.
        change = _each_as if is_multihead(module) else _first_as

        def on_all_tokens(module: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = change(self.hide, args, kwargs)
            return self.show(run(module, *args, **kwargs))

        return Shown(Call(module, on_all_tokens), self, change)

    def show(self, x: Any) -> Any:
        """From the compact set to all tokens: tensors of a layout with tokens, and tuples of such; anything else as it
        is."""
        if type(x) is not tuple:
            return self._show(x)
        shown = tuple(map(self.show, x))
        return x if _same(x, shown) else shown

    def hide(self, x: Any) -> Any:
        """The inverse of `show`."""
        return tuple(map(self.hide, x)) if type(x) is tuple else self._hide(x)

    def _show(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 3:
            return x
        partition, rows = self._partition, self._partition.rows
        tokens = partition.group.shape[1]
        if self._other is not None and self._has_others(x, self._other._partition.rows):
            return self._other._show(x)
        if x.dim() == 3 and self._tokens_first:
            return _spread(x.transpose(0, 1), partition).transpose(0, 1) if x.shape[0] == rows else x
        if x.dim() == 3 and x.shape[0] > partition.group.shape[0]:  # (B * H, M, M) or (B * H, M, D)
            return self._by_head(self._show, x, rows)
        if x.dim() == 3 and x.shape[1] == rows:
            return _spread(x, partition)
        if x.dim() != 4:
            return x
        if self._grid is not None and x.shape[1:3] == (rows, 1):  # (B, M, 1, C), Swin's
            return _spread(x.flatten(1, 2), partition).unflatten(1, self._grid)
        if self._grid is not None and x.shape[2:] == (rows, 1):  # (B, C, M, 1), convolutional LeViT's
            return _spread(x.flatten(2).transpose(1, 2), partition).transpose(1, 2).unflatten(2, self._grid)
        if self._maps and x.shape[2:] == (rows, rows):
            return spread_pairs(x, partition) if self._mixes else spread_attention(x, partition)
        if self._mixes and x.shape[1:3] == (rows, rows):  # (B, M, M, H)
            return spread_pairs(x.permute(0, 3, 1, 2), partition).permute(0, 2, 3, 1)
        if x.shape[2] == rows:  # (B, H, M, D)
            batch, heads, _, channels = x.shape
            full = _spread(x.transpose(1, 2).reshape(batch, rows, heads * channels), partition)
            return full.view(batch, tokens, heads, channels).transpose(1, 2)
        return _spread(x.flatten(2), partition).unflatten(2, x.shape[2:]) if x.shape[1] == rows else x  # (B, M, H, D)

    def _has_others(self, x: Tensor, tokens: int) -> bool:
        """Whether a tensor has the other tokens, so many for each of their images."""
        assert self._other is not None
        images = self._other._partition.group.shape[0]
        return x.shape[0] == images if images != self._partition.group.shape[0] else tokens in x.shape[1:3]

    def _by_head(self, change: Callable[[Any], Any], x: Tensor, tokens: int) -> Tensor:
        images = self._partition.group.shape[0]
        if x.shape[1] != tokens or x.shape[0] % images:
            return x
        changed: Tensor = change(x.unflatten(0, (images, -1)))
        return changed.flatten(0, 1)

    def _hide(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 3:
            return x
        partition, tokens = self._partition, self._partition.group.shape[1]
        if self._other is not None and self._has_others(x, self._other._partition.group.shape[1]):
            return self._other._hide(x)
        if x.dim() == 3 and self._tokens_first:
            return merge(x.transpose(0, 1), partition).transpose(0, 1) if x.shape[0] == tokens else x
        if x.dim() == 3 and x.shape[0] > partition.group.shape[0]:
            return self._by_head(self._hide, x, tokens)
        if x.dim() == 3 and x.shape[1] == tokens:
            return merge(x, partition)
        if x.dim() != 4:
            return x
        if self._grid is not None and x.shape[1:3] == self._grid:
            return merge(x.flatten(1, 2), partition).unsqueeze(2)
        if self._grid is not None and x.shape[2:] == self._grid:
            return merge(x.flatten(2).transpose(1, 2), partition).transpose(1, 2).unsqueeze(3)
        if self._maps and x.shape[2:] == (tokens, tokens):
            return merge_pairs(x, partition) if self._mixes else unspread_attention(x, partition)
        if self._mixes and x.shape[1:3] == (tokens, tokens):
            return merge_pairs(x.permute(0, 3, 1, 2), partition).permute(0, 2, 3, 1)
        if x.shape[2] == tokens:
            batch, heads, _, channels = x.shape
            compact = merge(x.transpose(1, 2).reshape(batch, tokens, heads * channels), partition)
            return compact.view(batch, -1, heads, channels).transpose(1, 2)
        return merge(x.flatten(2), partition).unflatten(2, x.shape[2:]) if x.shape[1] == tokens else x


class Shown:
    """Stands for a module that somebody wants to see all tokens in.

    Args:
        module: To be called on all tokens.
        full_grid: This run's.
        change: Which of the arguments of a call are tokens: `_first_as` or `_each_as`.
    """

    def __init__(self, module: Any, full_grid: FullGrid, change: Callable[..., Any] | None = None) -> None:
        self._evo_module = module
        self._evo_full_grid = full_grid
        self._evo_change = change or _each_as

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shown, named = self._evo_change(self._evo_full_grid.show, args, kwargs)
        if _same((*args, *kwargs.values()), (*shown, *named.values())):
            return self._evo_module(*args, **kwargs)  # without tokens, as what makes a position bias
        return self._evo_full_grid.hide(self._evo_module(*shown, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_evo_module"], name)


def _same(values: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(value is other for value, other in zip(values, others, strict=True))


def _each_as(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, all changed; what is given twice is also afterwards one object."""
    given = [*args, *kwargs.values()]
    changed = {id(value): change(value) for value in given}
    return tuple(changed[id(a)] for a in args), {name: changed[id(value)] for name, value in kwargs.items()}


def _first_as(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the first one changed, which may be given by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: change(kwargs[first])}


def _spread(x: Tensor, partition: Partition) -> Tensor:
    """`(B, M, C)` to `(B, T, C)`: every token the value of its row; zeros where nothing stands in for it."""
    if not partition.complete:
        x = F.pad(x, (0, 0, 0, 1))
    return torch.take_along_dim(x, partition.group.unsqueeze(-1), dim=1)
