"""Blocks whose keys and values a convolution makes of the whole map (PVT), and some with one in the MLP (SegFormer).

Slow and fast queries: the compact set asks and goes through the linear layers; the whole map, put back before every
block, answers and goes through the convolutions. Tokens are matched inside squares of the map, only so that matching
costs little on a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algorithm.partition import spread
from ..algorithm.rows import by_product, exporting, is_fixed
from ..algorithm.window_selection import WindowPartition, merge_windows
from ..algorithm.windows import Windows
from ..errors import UnsupportedInputError
from ..rewrite.view import Call, View, check_steered
from .hooks import FullGrid
from .window_blocks import Cut, WindowedBlocks

NOTICE = (
    "Blocks of PVT and SegFormer put their tokens back on the map, and merge them again, in every block: small models "
    "and single images are hardly faster patched, or slower (see docs/speed.md); measure yours with evopatch.benchmark"
)

REUSED = 2**24
"""Bytes of a tensor whose memory the allocator has again at the next call. Much larger ones it asks the system for
anew: a quarter of the time of 32 images."""
LARGEST = 16
"""So many tokens a side has a square at most that tokens are matched in."""


def first_selecting(depths: Sequence[int]) -> int:
    """The second block of the last stage but one: on the fine maps before, putting tokens back on the map and merging
    them again costs about what is saved.

    Args:
        depths: How many blocks each stage has.
    """
    return min(sum(depths[:-2]) + 1, sum(depths) - 1)


class ReducedBlocks(WindowedBlocks):
    """What is to know about a kind of such blocks; here without a convolution in the MLP."""

    single: Mapping[str, Any] = {}
    flat = True
    reducing: tuple[str, ...]
    """The attention's modules that reduce the map on the way to keys and values; the first that is there meets it."""
    projecting: tuple[str, ...]
    """Those that make keys and values, which meet the tokens where there is none."""
    compact: tuple[str, ...]
    """All modules, of the attention and of an MLP with a convolution, that a compact set goes through."""
    size_names: tuple[str, ...] = ("height", "width")
    """What the block's parts call what `sizes` gives."""

    def sizes(self, grid: tuple[int, int]) -> tuple[Any, ...]:
        """How the block and its parts are told the rows and columns of a map."""
        return grid

    def inputs(self, grid: tuple[int, int]) -> tuple[Any, ...]:
        return self.sizes(grid)

    def grid(self, inputs: tuple[Any, ...]) -> tuple[int, int]:
        """The inverse of `sizes`."""
        return inputs[0], inputs[1]

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        grid = self.grid(inputs)
        if exporting() and not all(map(is_fixed, grid)):
            raise UnsupportedInputError(
                f"{block._evo_name} was exported for images of any size: tokens are matched inside squares of its map, "
                "whose number is part of the program. Export one program for each size"
            )
        rows, columns = (-(-side // -(-side // LARGEST)) for side in grid)
        return Cut(Windows(grid, (rows, columns), (0, 0), pads_first=False), None, joined=True)

    def units(self, windows: Windows) -> Windows:
        return Windows(windows.grid, (1, 1), (0, 0), pads_first=False)

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        out = block.forward(x, *inputs, **options)
        return (out[0], ()) if isinstance(out, tuple) else (out, None)

    def stand_ins(
        self, block: Any, tokens: Tensor, cut: Cut, selected: WindowPartition, full_grid: FullGrid | None
    ) -> dict[str, Any]:
        assert self.norm is not None
        # By its own call and once, for those who ask as well: so its hooks see, and may change, what all tokens give.
        everything = getattr(block, self.norm)(tokens)
        asking = merge_windows(everything, selected, cut.windows)
        run = partial(self._answer, everything=everything, grid=cut.windows.grid, full_grid=full_grid)
        if self.inside_attention:
            run = partial(self._ask, answer=run, full_grid=full_grid)
        attention = called(block, self.attention, block._evo_name, run, full_grid)
        return {self.norm: lambda x: asking, self.attention: attention}

    def _ask(
        self, attention: Any, *args: Any, answer: Callable[..., Any], full_grid: FullGrid | None, **kwargs: Any
    ) -> Any:
        """What an attention runs that holds another one, on a compact set `(B, M, C)`: its own forward."""
        (inner,) = self.inside_attention
        parts = {**self.shown(attention, full_grid), inner: called(attention, inner, "attention", answer, full_grid)}
        return View(attention, parts).forward(*args, **kwargs)

    def _answer(
        self,
        attention: Any,
        *args: Any,
        everything: Tensor,
        grid: tuple[int, int],
        full_grid: FullGrid | None,
        **kwargs: Any,
    ) -> Any:
        """What an attention runs on a compact set `(B, M, C)`: its own forward, as on a map of one column."""
        parts = self.shown(attention, full_grid) | self.answering(attention, everything, grid)
        rows = args[0] if args else next(iter(kwargs.values()))
        column = dict(zip(self.size_names, self.sizes((rows.shape[1], 1)), strict=True))
        named = {name: kwargs.pop(name) for name in self.size_names if name in kwargs}
        if named:
            return View(attention, parts).forward(*args, **kwargs, **column)
        after = 1 + len(column)
        return View(attention, parts).forward(args[0], *column.values(), *args[after:], **kwargs)

    def answering(self, attention: Any, everything: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        """What stands for the attention's attributes by which keys and values are those of the whole map.

        Args:
            attention: Of a block.
            everything: `(B, N, C)`, what it would be given of the map.
            grid: Rows and columns.
        """
        for name in self.reducing:
            if (module := getattr(attention, name, None)) is not None:
                return {name: _instead(module, everything.transpose(1, 2).unflatten(2, grid))}
        return {name: _instead(getattr(attention, name), everything) for name in self.projecting}

    def shown(self, module: Any, full_grid: FullGrid | None) -> dict[str, Any]:
        """What stands for those modules in a part of the block that somebody wants to see all tokens in."""
        if full_grid is None:
            return {}
        parts = {name: module._modules[name] for name in self.compact if module._modules.get(name) is not None}
        return {name: full_grid.around(part) for name, part in parts.items() if full_grid.wants(part)}


class ConvolvingBlocks(ReducedBlocks):
    """The same with a convolution in the MLP."""

    others = ("mlp",)
    widening: str
    """The MLP's module before its convolution."""
    activation: str
    """The MLP's function after it."""

    def stand_ins(
        self, block: Any, tokens: Tensor, cut: Cut, selected: WindowPartition, full_grid: FullGrid | None
    ) -> dict[str, Any]:
        run = partial(self._convolve, cut=cut, selected=selected, full_grid=full_grid)
        stand_ins = super().stand_ins(block, tokens, cut, selected, full_grid)
        return stand_ins | {"mlp": called(block, "mlp", block._evo_name, run, full_grid)}

    def _convolve(
        self, mlp: Any, x: Tensor, *sizes: Any, cut: Cut, selected: WindowPartition, full_grid: FullGrid | None
    ) -> Any:
        """What an MLP runs on a compact set, some images at a time where that is faster."""
        step = None if full_grid is not None else self._at_once(mlp, x, cut.windows)
        if step is None or step >= x.shape[0]:
            return self._convolved(mlp, x, cut, selected, full_grid)
        some = [slice(first, first + step) for first in range(0, x.shape[0], step)]
        return torch.cat([self._convolved(mlp, x[own], cut, selected.of_images(own), None) for own in some])

    def _at_once(self, mlp: Any, x: Tensor, windows: Windows) -> int | None:
        """Of how many images the hidden features of a map are little enough memory to be there again; None: of all."""
        wide: int | None = getattr(getattr(mlp, self.widening), "out_features", None)
        if wide is None or torch.is_grad_enabled() or by_product(x):
            return None
        return max(1, REUSED // (windows.grid[0] * windows.grid[1] * wide * x.element_size()))

    def _convolved(self, mlp: Any, x: Tensor, cut: Cut, selected: WindowPartition, full_grid: FullGrid | None) -> Any:
        """Its own forward, with the whole map between its linear layers."""
        shown, activation = self.shown(mlp, full_grid), getattr(mlp, self.activation)
        widening = shown.get(self.widening, getattr(mlp, self.widening))
        parts = {
            **shown,
            self.widening: lambda x: spread(widening(x), selected.partition),
            # Not before it, which loses a third more: it isn't linear.
            self.activation: lambda x: merge_windows(activation(x), selected, cut.windows),
        }
        return View(mlp, parts).forward(x, *self.sizes(cut.windows.grid))


def called(module: Any, child: str, name: str, run: Callable[..., Any], full_grid: FullGrid | None) -> Any:
    """What stands for a child that is called with something else to run than its own forward.

    Args:
        module: Has it.
        child: Its name.
        name: The module's own, for errors.
        run: A function of the child and its arguments, the first of which are the tokens.
        full_grid: Shows its hooks all tokens.
    """
    part = module.get_submodule(child)
    check_steered(part, f"{name}.{child}")
    if full_grid is not None and full_grid.wants(part):
        return full_grid.around_run(part, run)
    return Call(part, run)


def _instead(module: Any, everything: Tensor) -> Callable[[Tensor], Any]:
    return lambda x: module(everything)
