"""What an adapter has to say about a kind of windowed block, and the mixin of a patched one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..algorithm.window_bias import compact_bias
from ..algorithm.window_selection import WindowPartition
from ..algorithm.windows import Windows
from ..rewrite.quiet import quietly
from ..rewrite.view import View, check_steered
from .block import TappedAttention
from .guarded import GuardedBlock
from .hooks import FullGrid


class Cut(NamedTuple):
    """How a block cuts its feature map, with what follows from it."""

    windows: Windows
    mask: Tensor | None
    """`(V, A, A)`, the shift mask."""
    joined: bool = False
    """The block attends over all windows together: they only say which tokens may share a group."""


class WindowedBlocks(ABC):
    """What is to know about a kind of windowed block. Without state: patched blocks are copied and pickled with it."""

    attention: str
    """The block's submodule that is called with windows `(windows, A, C)` and a mask."""
    home: str = ""
    """The Python module that the block is of, with its parts that are called with something else to run, where blocks
    can't be tried with modules of one's own; else empty."""
    inside_attention: tuple[str, ...] = ()
    """Paths in that of the modules that are called with something else to run than their own forward."""
    others: tuple[str, ...] = ()
    """The block's other modules that are."""
    traced: type[TappedAttention] | None = None
    """The mixin of an attention that runs generated code; None: it runs its own forward."""
    norm: str | None = None
    """The block's module before its attention, where it has one there."""
    single: Mapping[str, Any]
    """The block's attributes with which windows are single tokens, unshifted."""
    apart: tuple[str, ...] = ()
    """The block's modules that make nothing of the tokens they are given, as one that makes tables for their places."""
    last: str | None = None
    """The block's module on the main branch after everything else, if it has one, which is for all tokens: a norm, or
    a convolution."""
    channels_first: bool = False
    """The block takes `(B, C, h, w)`."""
    flat: bool = False
    """The block takes `(B, N, C)`, and is told the map's size."""

    @abstractmethod
    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        """How the block would cut `(B, h, w, C)` or `(B, N, C)`, as its host calls it with these other arguments."""

    def units(self, windows: Windows) -> Windows:
        """What is slow or fast as a whole with one representative, or none."""
        return windows

    def inputs(self, grid: tuple[int, int]) -> tuple[Any, ...]:
        """What else its host calls the block with, for a map of so many rows and columns."""
        return (grid,) if self.flat else ()

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Run the forward of a view of the block on the compact set `(B, M, C)`; here of one that takes a map.

        Returns:
            The same, and a tuple of what else the block returns; None where it returns a tensor.
        """
        return block.forward(x.unsqueeze(2)).squeeze(2), None

    def seen(self, block: Any, x: Tensor) -> Tensor:
        """`(B, N, C)` tokens as the block's attention sees them."""
        if self.norm is None:
            return x
        normalised: Tensor = quietly(getattr(block, self.norm), x)  # its hooks are for the block's own run
        return normalised

    def stand_ins(
        self, block: Any, tokens: Tensor, cut: Cut, selected: WindowPartition, full_grid: FullGrid | None
    ) -> dict[str, Any]:
        """What stands, by name, for the block's modules that tokens meet in.

        Args:
            block: The patched block.
            tokens: `(B, N, C)`, before it.
            cut: How it cuts its map.
            selected: Who goes through it for whom.
            full_grid: Shows all tokens to who wants to see them; None: nobody does.
        """
        return {self.attention: WindowAttention(block, cut, selected)}

    def attend(
        self, attention: Any, cut: Cut, selected: WindowPartition, others: tuple[Any, ...]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """How the attention is called on windows `(windows, R, C)` of the compact set.

        Args:
            attention: The block's attention module.
            cut: How the block cuts its map.
            selected: Who goes through it for whom.
            others: What else the block calls it with.

        Returns:
            What it runs, a function of itself and its arguments, and keyword arguments for it.
        """
        raise NotImplementedError(f"{type(self).__name__} says neither stand_ins nor attend")

    def laid_out(self, windows: Tensor) -> Tensor:
        """Windows `(windows, R, C)` as the attention takes them."""
        return windows

    @abstractmethod
    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        """Attention logits `(B, H, T)` of one token `(B, 1, C)` over others `(B, T, C)`, by the block's projections."""


class BiasedBlocks(WindowedBlocks):
    """Blocks whose attention adds a position bias of its own, the same for all windows and queries."""

    @abstractmethod
    def bias(self, attention: Any) -> Tensor:
        """The position bias, `(H, A, A)`."""

    @abstractmethod
    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        """How the attention is called on windows `(windows, R, C)` with a bias in place of its own and a mask.

        Args:
            attention: The block's attention module.
            bias: `(windows, H, R, R)`, or the same for all windows `(1, H, R, R)`.

        Returns:
            A view of the attention whose own forward runs, and keyword arguments for it.
        """

    def attend(
        self, attention: Any, cut: Cut, selected: WindowPartition, others: tuple[Any, ...]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        bias = compact_bias(self.bias(attention), cut.mask, cut.windows, selected)
        view, given = self.biased(attention, bias)
        return view.instead, given


class SlowFastWindowBlock(GuardedBlock):
    """Mixin of a patched windowed block."""

    _evo_blocks: WindowedBlocks


class WindowAttention:
    """Stands where a block calls its attention on single tokens: calls it on the windows of the compact set."""

    def __init__(self, block: Any, cut: Cut, selected: WindowPartition) -> None:
        self._blocks: WindowedBlocks = block._evo_blocks
        self._attention = block.get_submodule(self._blocks.attention)
        self._name = f"{block._evo_name}.{self._blocks.attention}"
        self._cut = cut
        self._selected = selected

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        selected, blocks = self._selected, self._blocks
        x = args[0] if args else kwargs.pop(next(iter(kwargs)))
        kwargs.pop("mask", None)  # its own is for single tokens: none
        shape = x.shape
        windows = 1 if self._cut.joined else selected.windows
        x = x.reshape(-1, selected.partition.rows // windows, shape[-1])
        if selected.held is not None:
            x = x * selected.held.reshape(x.shape[:2]).unsqueeze(2).to(x.dtype)
        check_steered(self._attention, self._name)
        run, given = blocks.attend(self._attention, self._cut, selected, args[1:])
        # By its own call, so that its hooks run.
        out = self._attention(blocks.laid_out(x), evo=run, **kwargs, **given)
        if isinstance(out, tuple):
            return (out[0].reshape(shape), *(None for _ in out[1:]))
        return out.reshape(shape)


class MaskByHead:
    """Given to an attention that adds a mask `(windows, A, A)` to its logits: adds one of every head as well.

    Such an attention asks a mask how many windows it has, and makes room for the heads and for the images.

    Args:
        bias: `(windows, H, R, R)`.
    """

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias
        self._added = False
        self.shape = bias.shape[:1]

    def unsqueeze(self, dim: int) -> Any:
        """First for the heads, which are there already; then for the images. It counts once: some add it twice."""
        if dim == 1:
            return self
        if self._added:
            return 0.0
        self._added = True
        return self._bias.unsqueeze(dim)
