"""What later blocks would attend to, by their own weights, on the tokens as they are now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithm.importance import detached, folded_attention
from ..rewrite.projections import Projections, weight_of
from .block import SlowFastBlock, TappedAttention


def look_ahead(
    blocks: Iterable[nn.Module], x: Tensor, inputs: dict[str, Any], prefix: int, readout: int
) -> Tensor | None:
    """Mean class attention of blocks that haven't run yet.

    Args:
        blocks: Patched ones.
        x: `(B, T, C)`, all tokens before the first block that selects.
        inputs: The selecting block's, beside the tokens.
        prefix: `P`.
        readout: How many of the first prefix tokens the head reads; 0 where it averages the patch tokens.

    Returns:
        `(B, N)` float32, or None if none of the blocks has queries and keys by plain linear layers.
    """
    found = [attention for block in blocks if (attention := _attention(block, x, inputs, prefix, readout)) is not None]
    if not found:
        return None
    total = found[0]
    for attention in found[1:]:
        total = total + attention
    return total / len(found)


def _attention(block: Any, x: Tensor, inputs: dict[str, Any], prefix: int, readout: int) -> Tensor | None:
    if not isinstance(block, SlowFastBlock) or len(block._evo_cores) != 1:
        return None
    attention: Any = block.get_submodule(block._evo_cores[0])
    code = attention._evo_code if isinstance(attention, (SlowFastBlock, TappedAttention)) else None
    projections: Projections | None = None if code is None else code.projections
    if projections is None:
        return None
    asked, answering = (weight_of(attention, projection, x) for projection in (projections.query, projections.key))
    if asked is None or answering is None:
        return None
    metric = block._evo_metric
    tokens = metric.functions[block.training](block, detached(x), tuple(inputs[n] for n in metric.inputs), None, block)
    # Queries are linear in the tokens: their mean is the mean token's.
    rows = tokens[:, :readout] if readout else tokens[:, prefix:].mean(1, keepdim=True)
    query = F.linear(rows, *asked).unflatten(-1, (projections.heads, -1)).transpose(1, 2)
    key = answering[0].unflatten(0, (projections.heads, -1))
    return folded_attention(tokens, query, key, projections.scale)[:, prefix:]
