"""The slow-fast run over the blocks of flat models and pyramids, and its state for the length of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor

from ..algorithm.bias import KeyBias, key_bias_of
from ..algorithm.correction import Correction, missed
from ..algorithm.importance import accumulate, accumulate_compact, coarsen
from ..algorithm.partition import Partition, distances, distribute, merge
from ..errors import BypassError
from ..rewrite.classes import host_class
from .beside import Beside
from .block import SlowFastBlock, answering_tokens, can_read_out, run_tapped, unwrapped
from .chain import Chain
from .hooks import FullGrid
from .host_state import HostState
from .layout import merged_tables
from .learned import correction_of
from .lent import Lent
from .protocols import PatchedBlock
from .ranking import RankingPass
from .tap import AttentionTap
from .token_counts import check_stage, check_tokens

Run = Callable[[Tensor, dict[str, Any], AttentionTap | None], Tensor]
"""Runs one block on `(B, M, C)` tokens with its other inputs; without a tap as unpatched."""


class TokenPass(RankingPass):
    """Class attention and partition by block index."""

    def __init__(self, state: HostState, compact: bool = True) -> None:
        super().__init__(state, compact)
        self.partitions: dict[int, Partition] = {}
        # Tokens' distances from their rows until a run ends, by its first block; between full grids by the block.
        self._apart: dict[int, Tensor] = {}
        self._first: dict[int, int] = {}
        self._key_biases: dict[int, KeyBias] = {}
        self._chain = Chain()
        self.entered: dict[int, Tensor] | None = None if state.passes is None else {}
        """Where somebody collects the passes, the tokens before each block, and after the last."""

    def run(self, index: int, block: PatchedBlock, *args: Any, **kwargs: Any) -> Any:
        """One block that takes `(B, M, C)`, or `(B, C, h, w)`, and the inputs that its adapter names."""
        own = host_class(block).forward
        if not self.active and not self._reads_out(index, block):
            return own(block, *args, **kwargs)
        first, *names = block._evo_metric.parameters
        x, *others = args or (kwargs.pop(first),)
        inputs = dict(zip(names, others, strict=False)) | kwargs
        for name, value in inputs.items():
            if name not in self.spec.trace.inputs and value is not None and value is not False:
                if name != self.spec.mask:
                    self.refuse(name, index)
                self.reads_prefix = self.reads_prefix and self.active

        beside = Beside(block._evo_name, self.spec.behind)

        def run(x: Tensor, inputs: dict[str, Any], tap: AttentionTap | None) -> Tensor:
            ordered = tap is None or tap.partition is None
            x = self.layout.of_block(index, x, ordered)
            out = own(block, x, **inputs) if tap is None else run_tapped(block, tap, x, **inputs)
            return self.layout.of_tokens(beside.tokens_of(out), ordered)

        follows = not self.compact and len(self.blocks[index]) == 1
        if follows:
            self._chain.given(index, x)
        tokens = self.advance(index, block, self.layout.of_tokens(x), inputs, run)
        out = self.layout.given_back(index, tokens)
        if follows:
            self._chain.returned(index, out)
        return beside.again(out, self.partitions.get(index))

    def advance(self, index: int, block: PatchedBlock, x: Tensor, inputs: Mapping[str, Any], run: Run) -> Tensor:
        """One block.

        Args:
            index: Its place, from 0.
            block: The block itself.
            x: `(B, T, C)`, or `(B, M, C)` inside a run in compact mode.
            inputs: The block's other inputs by name.
            run: How to run it.

        Returns:
            The same as `x`; of a block of several modules the compact set, until `leave`. Of the last block the prefix
            tokens `(B, P, C)` where nothing else is read.
        """
        if self.entered is None:
            return self._advance(index, block, x, inputs, run)
        self.entered[index] = x
        out = self.entered[index + 1] = self._advance(index, block, x, inputs, run)
        return out

    def _advance(self, index: int, block: PatchedBlock, x: Tensor, inputs: Mapping[str, Any], run: Run) -> Tensor:
        reads_out = self._reads_out(index, block)
        if not self.active and not reads_out:
            return run(x, dict(inputs), None)
        block._evo_refresh()
        if index == 0 and self.grid is not None:
            check_tokens(x.shape[1], self.spec.prefix, self.grid, self.name)
        if self.spec.pyramid is not None and (index == 0 or self.stage_of[index - 1] != self.stage_of[index]):
            check_stage(x.shape[1] - self.spec.prefix, self.spec.pyramid.grids, self.stage_of[index], self.name)
        named = dict(inputs) | {name: inputs.get(name) for name in self.spec.trace.inputs}
        self.mask.read(index, named, x, self.refuse)
        if self.spec.adds:
            self.given[index] = x
        if self.keep_ratio(index) == 1.0:
            if not reads_out and not self.accumulates(index):
                return run(x, named, None)
            return self._tapped(index, block, x, named, None, run, reads_out)
        begin = self.run_begin(index)
        before = None if self._chain.is_broken_at(index) else self.before(index, self.partitions, begin)
        partition = self.select(index, block, x, named) if before is None else before.to(x.device)
        self.partitions[index] = partition
        bias = self.before(index, self._key_biases, begin) if before is partition else key_bias_of(partition)
        if bias is not None:
            self._key_biases[index] = bias
        first = self._first[index] = begin if self.compact else index
        lent = Lent(partial(merge, x, partition)) if first == index else None
        compact = x if lent is None else lent.tensor
        out = self._tapped(index, block, compact, named, partition, run, reads_out)
        if reads_out:
            return out
        if lent is not None:  # no sooner: while the block runs, its host has `x`, and one more would be the most in use
            self._apart[index] = distances(x, lent.unchanged(), partition)
        if len(self.blocks[index]) == 1:
            return self.leave(index, out)
        # The modules that follow the first one of a block see what somebody's hooks on them are to see.
        full_grid = self._full_grid(index, partition)
        if self.spec.adds:
            self.given[index] = compact if full_grid is None else full_grid.show(compact)
        return out if full_grid is None else cast(Tensor, full_grid.show(out))

    def leave(self, index: int, x: Tensor) -> Tensor:
        """Put the full grid back where a run ends, or somebody looks."""
        out = self._put_back(index, x)
        if self.entered is not None:
            self.entered[index + 1] = out
        return out

    def _put_back(self, index: int, x: Tensor) -> Tensor:
        plan = self.plans[index]
        # Pruned models (timm's prune_intermediate_layers) end before their last run does.
        if self.keep_ratio(index) == 1.0 or (self.compact and not plan.ends and index + 1 < self.depth):
            return x
        full_grid = self._full_grid(index, self.partitions[index])
        if full_grid is not None and len(self.blocks[index]) > 1:
            x = full_grid.hide(x)
        # Nobody needs them again: what recomputes a block alone takes the full grid, what recomputes a whole run begins
        # with its entry.
        distance = self._apart.pop(self._first[index], None)
        if distance is None:
            raise BypassError(
                f"block {index} of '{self.name or 'model'}' ran a second time in one forward pass, after its run of "
                "blocks had ended: something computes single blocks anew. Use the library's own gradient checkpointing"
            )
        distance, partition = distance.to(x.device), self.partitions[index]
        out = distribute(distance, x, partition)
        correction = self._correction(index)
        return out if correction is None else out + missed(distance, partition, correction)

    def _correction(self, index: int) -> Correction | None:
        """What corrects the restored change at the end of a run, where that was learned."""
        block = unwrapped(self.modules[index], SlowFastBlock) if self.plans[index].ends else None
        if block is None or self.representative != "matched":
            return None
        return correction_of(block, self.run_begin(index))

    def _reads_out(self, index: int, block: PatchedBlock) -> bool:
        """Whether only the prefix tokens go through a block, all others are no more than looked at."""
        last = self.reads_prefix and index + 1 == self.depth
        return last and self.compact and not self.hooks_see and can_read_out(block)

    def _full_grid(self, index: int, partition: Partition | None) -> FullGrid | None:
        if not self.hooks_see or partition is None:
            return None
        spec = self.spec
        grid = spec.pyramid.grids[self.stage_of[index]] if spec.channels_first and spec.pyramid is not None else None
        return FullGrid(self.everything_seen, partition.shown(spec.behind), grid, spec)

    def _carried(self, index: int, g: Tensor) -> Tensor:
        """`g` after a block, on the grid of the block after it."""
        stage, pyramid = self.stage_of[index], self.spec.pyramid
        if pyramid is None or index + 1 == len(self.stage_of) or self.stage_of[index + 1] == stage:
            return g
        return coarsen(g, pyramid.grids[stage], pyramid.kernel)

    def _tapped(
        self,
        index: int,
        block: PatchedBlock,
        x: Tensor,
        inputs: dict[str, Any],
        partition: Partition | None,
        run: Run,
        reads_out: bool,
    ) -> Tensor:
        spec, accumulates = self.spec, self.accumulates(index)
        if partition is not None:
            for name in spec.token_inputs:
                inputs[name] = merged_tables(inputs[name], partition, spec.prefix, spec.tables_by_image)
        everything = None
        if reads_out:
            everything = answering_tokens(block, x, tuple(inputs[name] for name in block._evo_metric.inputs))
            x = x[:, : spec.prefix]
        if spec.mask in inputs:  # the tap has it
            inputs[spec.mask] = None
        tap = AttentionTap(
            spec.prefix,
            spec.readout,
            partition,
            accumulates,
            spec.received,
            block._evo_name,
            self._full_grid(index, partition),
            everything,
            self.mask,
            spec.behind,
            None if partition is None else self._key_biases.get(index),
            x.shape[0],
        )
        out = run(x, inputs, tap)
        if not tap.used:
            raise BypassError(
                f"{block._evo_name} ran without its patched attention: it was replaced, or its forward was. Use "
                "evopatch.remove(model) before such changes, and evopatch.apply after them"
            )
        if accumulates:
            tradeoff = cast(float, self.plans[index].tradeoff)
            attention = tap.class_attention()
            if partition is not None:
                g = accumulate_compact(self.accumulated(index, partition.group), attention, tradeoff, partition)
            else:
                own = attention[:, spec.prefix :]
                g = accumulate(self.past(index, own.shape[1], x.device), own, tradeoff)
            self.g[index] = self._carried(index, g)
        return out
