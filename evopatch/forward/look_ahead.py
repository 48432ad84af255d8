"""What later blocks would attend to, by their own weights, on the tokens as they are now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithm.importance import fold, folded_attention
from ..rewrite.linear_map import at_hand
from ..rewrite.projections import Projections
from .block import SlowFastBlock, attention_of, layer_norm_of, seen_tokens, unwrapped


def look_ahead(
    blocks: Iterable[nn.Module], running: nn.Module, x: Tensor, inputs: dict[str, Any], prefix: int, readout: int
) -> Tensor | None:
    """Mean class attention of blocks that haven't run yet.

    Args:
        blocks: Patched ones, of equally many heads.
        running: The block that selects now; may be one of them.
        x: `(B, T, C)`, all tokens before it.
        inputs: Its own, beside the tokens.
        prefix: `P`.
        readout: How many of the first prefix tokens the head reads; 0 where it averages the patch tokens.

    Returns:
        `(B, N)` float32, or None if of no block queries and keys are linear in the tokens.
    """
    look = _Look(x.detach(), inputs, prefix, readout)
    for wrapped in blocks:
        block: Any = unwrapped(wrapped, SlowFastBlock)
        attention: Any = None if block is None else attention_of(block)
        if attention is None or attention._evo_code.projections is None:
            continue
        if torch.compiler.is_compiling():
            look.at(block, attention)
            continue
        # What the running block holds itself is here, and has to stay.
        with at_hand(module for module in block.modules() if module is not running):
            look.at(block, attention)
    return look.attention()


class _Look:
    def __init__(self, x: Tensor, inputs: dict[str, Any], prefix: int, readout: int) -> None:
        self._x, self._inputs, self._prefix, self._readout = x, inputs, prefix, readout
        # Normed tokens, and the folded queries that meet them.
        self._met: list[tuple[Tensor, list[Tensor]]] = []
        # Those that layer norms of the same epsilon share, which differ in their weights alone.
        self._shared: dict[float, tuple[Tensor, list[Tensor]]] = {}

    def at(self, block: Any, attention: Any) -> None:
        """Look at one more block."""
        norm = layer_norm_of(block)
        tokens, queries = self._meeting(block, norm)
        projections: Projections = attention._evo_code.projections
        asked, answering = (projection.weight(attention, tokens) for projection in (projections.query, projections.key))
        if asked is None or answering is None:
            return
        # Queries are linear in the tokens: their mean is the mean token's.
        rows = tokens[:, : self._readout] if self._readout else tokens[:, self._prefix :].mean(1, keepdim=True)
        if norm is not None:
            # Without torch.addcmul, which not every converter knows.
            rows = rows * norm.weight.detach().to(rows) + norm.bias.detach().to(rows)
        query = F.linear(rows, *asked).unflatten(-1, (projections.heads, -1)).transpose(1, 2)
        folded = fold(query, answering[0].unflatten(0, (projections.heads, -1)), projections.scale)
        # The norm's bias adds the same to every token's logit.
        queries.append(folded if norm is None else folded * norm.weight.detach().to(folded))

    def _meeting(self, block: Any, norm: nn.LayerNorm | None) -> tuple[Tensor, list[Tensor]]:
        if norm is not None and norm.eps in self._shared:
            return self._shared[norm.eps]
        if norm is None:
            meeting: tuple[Tensor, list[Tensor]] = (seen_tokens(block, self._x, self._inputs), [])
        else:
            meeting = (F.layer_norm(self._x, norm.normalized_shape, eps=norm.eps), [])
            self._shared[norm.eps] = meeting
        self._met.append(meeting)
        return meeting

    def attention(self) -> Tensor | None:
        """Over the patch tokens, the mean of all blocks that could be looked at."""
        looks = sum(len(queries) for _, queries in self._met)
        if not looks:
            return None
        total: Any = 0.0
        for tokens, queries in self._met:
            if queries:
                total = total + folded_attention(torch.cat(queries, dim=1), tokens) * (len(queries) / looks)
        patches: Tensor = total[:, self._prefix :]
        return patches
