"""The slow-fast run over windowed blocks (Swin), and its state for the length of one forward pass.

Between two blocks there is always the full grid: windows are cut anew in every block, shifted or not, so no compact set
outlives a block. A block stays a black box. It runs its own forward on a view in which windows are single tokens, so
that its cutting and joining move nothing, and in which its attention is called on the windows of the compact set.

Selection `"stage"` looks at importance once per run of blocks. The blocks of a run with the same windows, those shifted
and those not, share a partition, made before the first of them. Selection `"layer"` makes one before every block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algorithm.importance import accumulate, coarsen
from ..algorithm.partition import distribute
from ..algorithm.selection import num_slow
from ..algorithm.window_bias import compact_bias, compact_mask
from ..algorithm.window_selection import WindowPartition, match_tokens, merge_windows, select_windows, window_novelty
from ..algorithm.windows import Windows, window_means
from ..rewrite.classes import Swapped, host_class
from .tokens import ORIGINAL, HostState, Step, TokenPass, View

REGIONS = 4
"""So many parts of the image that don't attend to each other may lie in one shifted window."""


class Cut(NamedTuple):
    """How a block cuts its feature map, with what follows from it."""

    windows: Windows
    mask: Tensor | None
    """`(V, A, A)`, the block's own shift mask."""


class WindowedBlocks(ABC):
    """What is to know about a kind of windowed block. Without state: patched blocks are copied and pickled with it."""

    attention: str
    """The block's submodule that is called with windows `(windows, A, C)` and a mask."""
    single: Mapping[str, Any]
    """The block's attributes with which windows are single tokens, unshifted."""
    last_norm: str | None = None
    """The block's norm on the main branch after everything else, if it has one: it's for all tokens."""

    @abstractmethod
    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        """How the block would cut `x`, as it is called by its host with these other arguments."""

    @abstractmethod
    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Run the forward of a view of the block on the compact set `(B, M, C)`."""

    @abstractmethod
    def seen(self, block: Any, x: Tensor) -> Tensor:
        """`(B, N, C)` tokens as the block's attention sees them."""

    @abstractmethod
    def bias(self, attention: Any) -> Tensor:
        """The position bias, `(H, A, A)`."""

    @abstractmethod
    def biased(self, attention: Any, bias: Tensor) -> Callable[..., Any]:
        """The attention of windows `(windows, R, C)`, with bias `(windows, H, R, R)` in place of its own and a mask."""

    def masked(self, mask: Tensor | None) -> Any:
        """A shift mask `(windows, A, A)` as the attention takes it."""
        return mask

    @abstractmethod
    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        """Attention logits `(B, H, T)` of one token `(B, 1, C)` over others `(B, T, C)`, by the block's projections."""


class SlowFastWindowBlock(Swapped):
    """Mixin of a patched windowed block."""

    _evo_state: HostState
    _evo_name: str
    _evo_blocks: WindowedBlocks

    def forward(self, *args: Any, evo: Callable[..., Any] | object | None = None, **kwargs: Any) -> Any:
        """The host's own forward, or what a step of the slow-fast forward gives instead."""
        if evo is None:
            self._evo_state.refuse_bypass(self._evo_name)
        if evo is None or evo is ORIGINAL:
            return self._evo_host_class.forward(self, *args, **kwargs)
        assert callable(evo)
        return evo(self, *args, **kwargs)


class BlockView(View):
    """Stands for a block or an attention module whose own methods look at other attributes."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(host_class(self._host), name, None)
        return partial(method, self) if isinstance(method, FunctionType) else getattr(self._host, name)


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


class WindowedPass(TokenPass):
    """One forward pass over windowed blocks: everything by block index, so that a recomputed block finds its own."""

    def __init__(self, state: HostState, depth: int, compact: bool) -> None:
        super().__init__(state, depth, compact)
        self._selected: dict[int, tuple[Windows, WindowPartition]] = {}
        self._grids: dict[int, tuple[int, int]] = {}
        self._first: dict[int, int] = {}

    def step(self, index: int, block: nn.Module) -> Step:
        """What stands where the host calls the block."""
        return _WindowStep(self, index, block)

    def run(self, index: int, block: Any, x: Tensor, *inputs: Any, **options: Any) -> Any:
        """One block.

        Args:
            index: Its place, from 0.
            block: The block itself.
            x: `(B, h, w, C)` or `(B, N, C)`, the full grid.
            *inputs: What else its host calls it with.
            **options: The same, by name.

        Returns:
            What the block returns.
        """
        own, plan, blocks = block._evo_host_class.forward, self.plans[index], block._evo_blocks
        observes = plan.tradeoff is not None and self.representative != "matched"
        if not self.active or (plan.keep_ratio == 1.0 and not observes):
            return own(block, x, *inputs, **options)
        cut: Cut = blocks.cut(block, x, inputs, options)
        tokens = x.flatten(1, 2) if x.dim() == 4 else x
        with torch.no_grad():
            selected = None if plan.keep_ratio == 1.0 else self._selection(index, block, tokens, cut)
            if observes and index not in self.g:
                self.g[index] = self._observe(index, block, tokens, cut.windows)
                self._grids[index] = cut.windows.grid
        if selected is None:
            return own(block, x, *inputs, **options)
        partition = selected.partition
        entry = merge_windows(tokens, selected, cut.windows)
        changed = {**blocks.single, blocks.attention: _Attention(block, cut, selected)}
        if blocks.last_norm is not None:
            changed[blocks.last_norm] = _unchanged
        out, rest = blocks.call(BlockView(block, changed), entry, inputs, options)
        full = distribute(tokens, out - entry, partition)
        if blocks.last_norm is not None:
            full = getattr(block, blocks.last_norm)(full)
        full = full.view(x.shape)
        return full if rest is None else (full, *rest)

    def _observe(self, index: int, block: Any, tokens: Tensor, cut: Windows) -> Tensor:
        """`(B, N)`: accumulated attention of the map's mean query over the windows' mean keys."""
        blocks, before = block._evo_blocks, self._accumulated(index, tokens)
        if cut.number == 1 and before is not None:
            return before
        places = cut.places(tokens.device)
        seen = blocks.seen(block, tokens)
        means = window_means(seen, places, cut)
        logits = blocks.logits(block.get_submodule(blocks.attention), seen.mean(1, keepdim=True), means)
        attention = logits.softmax(-1, dtype=torch.float32).mean(1)
        attention = attention.index_select(1, places.div(cut.area, rounding_mode="floor"))
        return accumulate(before, attention, self.plans[index].tradeoff or 0.0)

    def _accumulated(self, index: int, x: Tensor) -> Tensor | None:
        """`g` before a block, on the grid of its stage; None before the first one."""
        if index == 0:
            return None
        g = self.g[index - 1].to(x.device)
        same_stage = self.stage_of[index] == self.stage_of[index - 1]
        return g if same_stage else coarsen(g, self._grids[index - 1], kernel=2)

    def _selection(self, index: int, block: Any, tokens: Tensor, cut: Cut) -> WindowPartition | None:
        """Who goes through the block for whom; None: every token for itself."""
        plan, matched = self.plans[index], self.representative == "matched"
        first = self._first[index] = index if plan.selects else self._first[index - 1]
        if cut.windows.area < 2 or (cut.windows.number < 2 and not matched):
            return None
        for earlier in range(first, index + 1):
            windows_there, selected = self._selected.get(earlier, (None, None))
            if windows_there == cut.windows and selected is not None:
                break
        else:
            selected = (
                self._match(index, block, tokens, cut) if matched else self._choose(index, first, block, tokens, cut)
            )
        if selected is not None:
            self._selected[index] = (cut.windows, selected)
            self.partitions[index] = selected.partition
        return selected

    def _match(self, index: int, block: Any, tokens: Tensor, cut: Cut) -> WindowPartition | None:
        keep = num_slow(cut.windows.area, self.plans[index].keep_ratio)
        if cut.mask is not None:
            keep = max(keep, REGIONS)
        if keep >= cut.windows.area:
            return None
        places = cut.windows.places(tokens.device)
        return match_tokens(block._evo_blocks.seen(block, tokens), keep, places, cut.windows, cut.mask)

    def _choose(self, index: int, first: int, block: Any, tokens: Tensor, cut: Cut) -> WindowPartition:
        g = self._accumulated(first, tokens)
        assert g is not None  # the first block never selects
        places = cut.windows.places(tokens.device)
        importance = window_means(g, places, cut.windows)
        seen = block._evo_blocks.seen(block, tokens)
        novelty = window_novelty(seen, cut.windows.tokens(places), cut.windows)
        loss = importance.pow(self.importance) * novelty
        keep = num_slow(cut.windows.number, self.plans[index].keep_ratio)
        return select_windows(loss, importance, keep, places, cut.windows, self.representative == "single")


def _unchanged(x: Tensor) -> Tensor:
    return x


class _WindowStep(Step):
    """One windowed block in one forward pass; stands where the host calls the block."""

    def __init__(self, evo_pass: WindowedPass, index: int, block: nn.Module) -> None:
        super().__init__(evo_pass, index, block)
        self._run_block = partial(evo_pass.run, index)

    def __call__(self, x: Tensor, *inputs: Any, **options: Any) -> Any:
        # Through the block's __call__, so that its hooks run, and see the full grid.
        return self._block(x, *inputs, evo=self._run_block, **options)


class _Attention:
    """Stands where a block calls its attention on single tokens: calls it on the windows of the compact set."""

    def __init__(self, block: Any, cut: Cut, selected: WindowPartition) -> None:
        self._blocks: WindowedBlocks = block._evo_blocks
        self._attention = block.get_submodule(self._blocks.attention)
        self._cut = cut
        self._selected = selected

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        selected, blocks = self._selected, self._blocks
        kwargs.pop("mask", None)  # its own is for single tokens: none
        x = x.view(-1, selected.partition.rows // selected.windows, x.shape[-1])
        if selected.held is not None:
            x = x * selected.held.flatten(0, 1).unsqueeze(2).to(x.dtype)
        if selected.place is None:
            mask = compact_mask(self._cut.mask, selected)
            out = self._attention(x, blocks.masked(mask), **kwargs)
        else:
            bias = blocks.bias(self._attention)
            bias = compact_bias(bias, self._cut.mask, self._cut.windows, selected)
            out = blocks.biased(self._attention, bias)(x, **kwargs)
        if isinstance(out, tuple):
            return out[0].reshape(-1, 1, out[0].shape[-1]), None
        return out.reshape(-1, 1, out.shape[-1])
