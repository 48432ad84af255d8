"""What later blocks would attend to, by their own weights, on the tokens as they are now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithm.importance import folded_attention
from ..rewrite.projections import Projections
from ..rewrite.weights import at_hand
from .block import SlowFastBlock, attention_of, seen_tokens, unwrapped


def look_ahead(
    blocks: Iterable[nn.Module],
    running: nn.Module,
    seen: Tensor,
    x: Tensor,
    inputs: dict[str, Any],
    prefix: int,
    readout: int,
) -> Tensor | None:
    """Mean class attention of blocks that haven't run yet.

    Args:
        blocks: Patched ones.
        running: The block that selects now; may be one of them.
        seen: `(B, T, C)`, what its projections would get.
        x: `(B, T, C)`, all tokens before it.
        inputs: Its own, beside the tokens.
        prefix: `P`.
        readout: How many of the first prefix tokens the head reads; 0 where it averages the patch tokens.

    Returns:
        `(B, N)` float32, or None if of no block queries and keys are linear in the tokens.
    """
    found = []
    for wrapped in blocks:
        block: Any = unwrapped(wrapped, SlowFastBlock)
        attention: Any = None if block is None else attention_of(block)
        if attention is None or attention._evo_code.projections is None:
            continue
        if block is running:
            observed = _class_attention(attention, seen, prefix, readout)
        elif torch.compiler.is_compiling():
            observed = _class_attention(attention, seen_tokens(block, x, inputs), prefix, readout)
        else:
            with at_hand(block):
                observed = _class_attention(attention, seen_tokens(block, x, inputs), prefix, readout)
        if observed is not None:
            found.append(observed)
    if not found:
        return None
    total = found[0]
    for observed in found[1:]:
        total = total + observed
    return total / len(found)


def _class_attention(attention: Any, tokens: Tensor, prefix: int, readout: int) -> Tensor | None:
    projections: Projections = attention._evo_code.projections
    asked, answering = (projection.weight(attention, tokens) for projection in (projections.query, projections.key))
    if asked is None or answering is None:
        return None
    # Queries are linear in the tokens: their mean is the mean token's.
    rows = tokens[:, :readout] if readout else tokens[:, prefix:].mean(1, keepdim=True)
    query = F.linear(rows, *asked).unflatten(-1, (projections.heads, -1)).transpose(1, 2)
    key = answering[0].unflatten(0, (projections.heads, -1))
    return folded_attention(tokens, query, key, projections.scale)[:, prefix:]
