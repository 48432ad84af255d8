"""The slow-fast run over windowed blocks (Swin), and its state for the length of one forward pass.

Between two blocks there is always the full grid: windows are cut anew in every block, shifted or not, so no compact set
outlives a block. A block stays a black box. It runs its own forward on a view in which windows are single tokens, so
that its cutting and joining move nothing, and in which its attention is called on the windows of the compact set.

Selection `"stage"` looks at importance once per run of blocks. The blocks of a run with the same windows, those shifted
and those not, share a partition, made before the first of them. Selection `"layer"` makes one before every block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algorithm.correction import missed
from ..algorithm.importance import accumulate, coarsen
from ..algorithm.partition import Partition, distances, distribute
from ..algorithm.selection import num_slow
from ..algorithm.window_selection import WindowPartition, match_tokens, merge_windows, select_windows, window_novelty
from ..algorithm.windows import Windows, window_means
from ..rewrite.quiet import unkept
from ..rewrite.view import View
from .forward_pass import ForwardPass
from .hooks import FullGrid
from .host_state import HostState
from .launches import warn_if_launches_count
from .learned import correction_of
from .lent import Lent
from .window_blocks import Cut, WindowedBlocks


class Received(NamedTuple):
    """What the tokens of a block received from the rows that went through it."""

    tokens: Tensor
    """`(B, N, C)`, before the block."""
    entry: Tensor
    """`(B, M, C)`, the rows they were merged into."""
    partition: Partition
    out: Tensor
    """`(B, N, C)`, the tokens after the block."""
    alone: Tensor
    """`(B, N, C)`, what they would be had each gone through it."""


REGIONS = 4
"""So many parts of the image that don't attend to each other may lie in one shifted window."""


class WindowedPass(ForwardPass):
    """One forward pass over windowed blocks: everything by block index, so that a recomputed block finds its own."""

    def __init__(self, state: HostState, compact: bool = True) -> None:
        super().__init__(state, compact)
        self.g: dict[int, Tensor] = {}
        self.partitions: dict[int, Partition] = {}
        self._selected: dict[int, tuple[Windows, WindowPartition]] = {}
        self._grids: dict[int, tuple[int, int]] = {}
        self._watch = state.watch

    def run(self, index: int, block: Any, *args: Any, **options: Any) -> Any:
        """One block.

        Args:
            index: Its place, from 0.
            block: The block itself.
            *args: `(B, h, w, C)` or `(B, N, C)`, the full grid, and what else its host calls it with.
            **options: The same, by name.

        Returns:
            What the block returns.
        """
        given, *inputs = args
        own, blocks, keeps_all = block._evo_host_class.forward, block._evo_blocks, self.keep_ratio(index) == 1.0
        observes = self.plans[index].tradeoff is not None and self.representative != "matched"
        if not self.active or (keeps_all and not observes):
            return own(block, given, *inputs, **options)
        x = given.permute(0, 2, 3, 1) if blocks.channels_first else given
        cut: Cut = blocks.cut(block, x, tuple(inputs), options)
        if self.representative != "matched":
            cut = cut._replace(windows=blocks.units(cut.windows))
        tokens = x.flatten(1, 2) if x.dim() == 4 else x
        with torch.no_grad(), unkept():
            selected = None if keeps_all else self._selection(index, block, tokens, cut)
            if observes and index not in self.g:
                self.g[index] = self._observe(index, block, tokens, cut.windows)
                self._grids[index] = cut.windows.grid
        if selected is None:
            return own(block, given, *inputs, **options)
        partition = selected.partition
        warn_if_launches_count(tokens)
        lent = Lent(partial(merge_windows, tokens, selected, cut.windows))
        full_grid = None
        if self.hooks_see:
            # Where tokens lie in rows and columns; else a tensor of four axes is of attention.
            grid = None if blocks.flat else cut.windows.grid
            full_grid = FullGrid(self.everything_seen, partition, grid, self.spec, maps=False)
        changed = {
            **blocks.single,
            **_shown(block, full_grid),
            **blocks.stand_ins(block, tokens, cut, selected, full_grid),
        }
        if blocks.last is not None:
            changed[blocks.last] = _unchanged
        out, rest = blocks.call(View(block, changed), lent.tensor, tuple(inputs), options)
        entry = lent.unchanged()
        full = distribute(tokens, out - entry, partition)
        correction = correction_of(block, index) if self.representative == "matched" else None
        if correction is not None:
            full = full + missed(distances(tokens, entry, partition), partition, correction)
        if self._watch is not None:
            each = alone(block, blocks, tokens, given, tuple(inputs), options)
            self._watch(index, Received(tokens, entry, partition, full, each))
        full = full.view(x.shape)
        if blocks.channels_first:
            full = full.permute(0, 3, 1, 2)
        if blocks.last is not None:
            full = getattr(block, blocks.last)(full)
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
        earlier = [i for i in range(index) if i in self.g]  # somebody's code may leave blocks out
        if not earlier:
            return None
        last, g = earlier[-1], self.g[earlier[-1]].to(x.device)
        same_grid = self.stage_of[index] == self.stage_of[last] or not self.spec.coarsens
        return g if same_grid else coarsen(g, self._grids[last], kernel=2)

    def _selection(self, index: int, block: Any, tokens: Tensor, cut: Cut) -> WindowPartition | None:
        """Who goes through the block for whom; None: every token for itself."""
        matched = self.representative == "matched"
        first = self.run_begin(index)
        if (cut.windows.area if matched else cut.windows.number) < 2:
            return None
        for earlier in range(first, index + 1):
            windows_there, selected = self._selected.get(earlier, (None, None))
            if windows_there == cut.windows and selected is not None:
                selected = selected.to(tokens.device)
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
        keep = num_slow(cut.windows.area, self.keep_ratio(index))
        if cut.mask is not None:
            keep = max(keep, REGIONS)
        # Where much of the map is padding, the rows of all windows may be more than there are tokens.
        rows = cut.windows.number * (keep + int(cut.windows.padded))
        if keep >= cut.windows.area or rows >= tokens.shape[1]:
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
        keep = num_slow(cut.windows.number, self.keep_ratio(index))
        return select_windows(loss, importance, keep, places, cut.windows, self.representative == "single")


def alone(
    block: Any, blocks: WindowedBlocks, like: Tensor, given: Tensor, inputs: tuple[Any, ...], options: dict[str, Any]
) -> Tensor:
    """`(B, N, C)` tokens after a block that all go through, before what it has on the main branch after all else."""
    out = View(block, {} if blocks.last is None else {blocks.last: _unchanged}).forward(given, *inputs, **options)
    tokens: Tensor = out[0] if isinstance(out, tuple) else out
    return (tokens.permute(0, 2, 3, 1) if blocks.channels_first else tokens).reshape(like.shape)


def _shown(block: Any, full_grid: FullGrid | None) -> dict[str, Any]:
    """What stands for the modules of a block that somebody wants to see all tokens in."""
    if full_grid is None:
        return {}
    children = [(n, child) for n, child in block._modules.items() if child and n not in block._evo_blocks.apart]
    return {name: full_grid.around(child) for name, child in children if full_grid.wants(child)}


def _unchanged(x: Tensor) -> Tensor:
    return x
