"""By what the tokens of one forward pass are ranked, and which are slow."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithm.foresight import foreseen
from ..algorithm.importance import accumulate
from ..algorithm.partition import Partition
from ..algorithm.selection import num_slow, select_matched, select_top
from ..rewrite.linear_map import given
from .block import SlowFastBlock, seen_tokens, unwrapped
from .forward_pass import ForwardPass
from .host_state import HostState
from .launches import warn_if_launches_count
from .layout import Layout
from .learned import foresight_of
from .look_ahead import Look, can_look_ahead
from .mask import Mask
from .protocols import PatchedBlock


class RankingPass(ForwardPass):
    """Of tokens, by the class attention of blocks that ran or will."""

    def __init__(self, state: HostState, compact: bool = True) -> None:
        super().__init__(state, compact)
        self.g: dict[int, Tensor] = {}
        """`(B, N)` accumulated class attention, after a block."""
        self.layout = Layout(self.spec, self.stage_of)
        self.mask = Mask(self.spec.mask, self.spec.prefix)
        """Who is left out of attention."""
        self._foreseen: bool | None = None

    def select(self, index: int, block: PatchedBlock, x: Tensor, inputs: dict[str, Any]) -> Partition:
        """The slow tokens among `(B, T, C)`, before a block with its other inputs, and who stands for the others."""
        warn_if_launches_count(x)
        prefix = self.spec.prefix
        keep = num_slow(x.shape[1] - prefix, self.keep_ratio(index))
        tokens_out = self.mask.left_out
        left_out = None if tokens_out is None else tokens_out[:, prefix:]
        if self.representative != "matched":
            g, single = self.accumulated(index, x), self.representative == "single"
            return select_top(g, keep, prefix, single, left_out)
        if not self.spec.looks_ahead:
            seen = self.layout.of_tokens(seen_tokens(block, self.layout.of_block(index, x), inputs))
            features, g = F.normalize(seen[:, prefix:], dim=-1), self.accumulated(index, x)
        else:
            look, running = Look(x, inputs, prefix, self.spec.readout, tokens_out), cast(Any, block)
            features = look.features(running)
            weights = foresight_of(running)
            if weights is None:
                g = self._importance(index, look.ahead(self._looked_at(index), running), x)
            else:
                g = foreseen(features, given(weights, features), left_out)
        return select_matched(g, features, keep, prefix, self.importance, left_out)

    def _importance(self, index: int, ahead: Tensor | None, x: Tensor) -> Tensor:
        """What the block that selects ranks tokens by, given what later ones would attend to, where they say."""
        if ahead is not None and self.look_ahead == 1.0:
            return ahead
        g = self.accumulated(index, x)
        return g if ahead is None else accumulate(g, ahead, self.look_ahead)

    def _looked_at(self, index: int) -> list[Any]:
        plan = self.plans[index]
        if plan.selects:
            return [self.modules[i] for i in plan.looks_at if i < len(self.modules)]
        return [self.modules[index]] if self.plans[self.run_begin(index)].looks_at else []

    def accumulates(self, index: int) -> bool:
        """Whether a later selection reads a block's class attention."""
        if self.plans[index].tradeoff is None:
            return False
        if self._foreseen is None:
            selecting = [i for i, plan in enumerate(self.plans[: self.depth]) if plan.selects]
            self._foreseen = bool(selecting) and all(self._needs_no_past(i) for i in selecting)
        return not self._foreseen

    def _needs_no_past(self, index: int) -> bool:
        """Whether a selection ranks tokens by nothing that earlier blocks attended to."""
        block = unwrapped(self.modules[index], SlowFastBlock)
        if self.representative == "matched" and block is not None and foresight_of(block) is not None:
            return True
        return self.look_ahead == 1.0 and can_look_ahead(self._looked_at(index))

    def accumulated(self, index: int, x: Tensor) -> Tensor:
        """`g` before a block that selects, for `(B, T, ...)`; the same for all where none ran before it."""
        patches = x.shape[1] - self.spec.prefix
        g = self.past(index, patches, x.device)
        return x.new_ones(x.shape[0], patches).float() if g is None else g

    def past(self, index: int, patches: int, device: torch.device) -> Tensor | None:
        """`g` before a block; None where no block ran before it, or on other tokens."""
        g = self.before(index, self.g)
        return None if g is None or g.shape[1] != patches else g.to(device)
