"""How important tokens are: the class attention of a block, accumulated over depth (Evo-ViT, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .padding import without
from .partition import Partition
from .rows import exporting, filled_up, in_forward_mode, on_accelerator


def class_attention(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None, share: Tensor | None = None
) -> Tensor:
    """Attention of the readout over all tokens, averaged over heads: one row of the softmax, not the whole matrix.

    Args:
        query: `(B, H, R, D)`, the queries of the tokens that the head reads: the class token, class and distillation
            token, or all patch tokens where the head averages them. Of the latter their mean query is used.
        key: `(B, H, M, D)`, or of fewer heads, each shared by as many heads of queries (grouped-query attention).
        scale: Factor on the logits, `D ** -0.5` as a rule.
        bias: Added to the logits, broadcastable to `(B, H, R, M)`: log sizes and position biases.
        share: `(B, R)`, sums to 1 over `R`: take the mean query weighted so. None: attend with each query, then
            average the attention.

    Returns:
        `(B, M)` float32, sums to 1 (section 3.2 of the paper: the class attention averaged over heads).
    """
    query, key = detached(query), detached(key)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if share is not None:
        query = torch.einsum("br,bhrd->bhd", share.to(query.dtype), query).unsqueeze(2)
        if bias is not None and bias.shape[-2] > 1:
            bias = torch.einsum("br,bhrm->bhm", share.to(bias.dtype), bias.expand(share.shape[0], -1, -1, -1))
            bias = bias.unsqueeze(2)
    if exporting():
        logits = query @ key.transpose(2, 3)
    else:
        # At batch 1 operator calls count: this product of all heads is a third of those of one over four axes, where
        # some converters lose track of the axes.
        logits = query.flatten(0, 1) @ key.flatten(0, 1).transpose(1, 2)
        logits = logits.view(*query.shape[:3], key.shape[2])
    logits = logits * scale if bias is None else torch.add(detached(bias), logits, alpha=scale)
    return logits.softmax(dim=-1, dtype=torch.float32).mean(dim=(1, 2))


def fold(query: Tensor, key_weight: Tensor) -> Tensor:
    """Queries that meet tokens whose keys nobody has computed: the key projection is folded into them.

    `<q, W_k n> = <W_k^T q, n>`, and what the projection's bias adds is the same for every token, so it drops out of the
    softmax: a vector of `C` numbers per head in place of the keys of all tokens.

    Args:
        query: `(Q, H, D)`, the queries of all images' readouts.
        key_weight: `(H, D, C)`.

    Returns:
        `(H, Q, C)`: with tokens `(T, C)` of a query's image, as the block's projections take them, they make the
        attention logits but for their scale.
    """
    # By head, not by image: the weights would be copied for each.
    return torch.bmm(query.transpose(0, 1), key_weight)


def folded_attention(folded: Tensor, tokens: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Class attention of queries whose keys nobody has computed.

    Args:
        folded: `(B, Q, C)`, see `fold`, times the scale.
        tokens: `(B, T, C)`.
        left_out: `(B, T)` bool, tokens that no other attends to.

    Returns:
        The mean over the queries, `(B, T)` float32, sums to 1.
    """
    if on_accelerator(tokens):
        # Rows of an odd number of tokens would take four times as long.
        wide = filled_up(folded, axis=-2)
        logits = torch.bmm(tokens, wide.transpose(1, 2)).transpose(1, 2)[:, : folded.shape[1]]
    else:
        logits = torch.bmm(folded, tokens.transpose(1, 2))
    logits = without(logits, None if left_out is None else left_out.unsqueeze(1))
    return logits.softmax(dim=-1, dtype=torch.float32).mean(dim=1)


def detached(x: Tensor) -> Tensor:
    """Without a gradient."""
    # A trace is checked by another one, made without gradients: both have to record the same.
    return x.detach() if x.requires_grad or exporting() or in_forward_mode() else x


def accumulate(g: Tensor | None, attention: Tensor, tradeoff: float) -> Tensor:
    """Equation 4: `g_l = (1 - t) * g_{l-1} + t * a_l`; the first observation is taken whole.

    Args:
        g: `(B, N)` float32, or None before the first block.
        attention: `(B, N)` float32.
        tradeoff: `t` in [0, 1].
    """
    return attention if g is None else _between(g, attention, tradeoff)


def accumulate_compact(g: Tensor, attention: Tensor, tradeoff: float, partition: Partition) -> Tensor:
    """Equation 4 where only the compact set went through the block.

    A token of a size-weighted row gets that row's attention divided by the row's size. Without sizes only the slow
    tokens are updated, the others keep their value.

    Args:
        g: `(B, N)` float32.
        attention: `(B, M)` float32, over the compact set.
        tradeoff: `t` in [0, 1].
        partition: Of the block's run.
    """
    group = partition.group[:, partition.group.shape[1] - g.shape[1] :]
    if partition.log_size is not None:
        share = attention * partition.log_size.neg().exp()
        return _between(g, (share if partition.complete else F.pad(share, (0, 1))).gather(1, group), tradeoff)
    member = F.pad(attention, (0, 1)).gather(1, group)
    return torch.where(partition.slow, _between(g, member, tradeoff), g)


def _between(g: Tensor, attention: Tensor, tradeoff: float) -> Tensor:
    # Without torch.lerp, which not every converter knows.
    return g * (1.0 - tradeoff) + attention * tradeoff


def coarsen(g: Tensor, grid: tuple[int, int], kernel: int) -> Tensor:
    """Accumulated class attention on the grid of a pyramid's next stage, half as fine.

    Args:
        g: `(B, N)` float32.
        grid: Rows and columns of it.
        kernel: A coarser token gets the mean over a square of so many tokens a side: 2 where each stands for four
            tokens, 3 where every second token is taken and its neighbours count.
    """
    odd = kernel % 2 == 1
    pooled = F.avg_pool2d(
        g.view(-1, 1, *grid), kernel, 2, kernel // 2 if odd else 0, ceil_mode=not odd, count_include_pad=False
    )
    return pooled.flatten(1)


def default_scale(query: Tensor) -> float:
    """`D ** -0.5` for queries `(B, H, R, D)`."""
    return 1.0 / math.sqrt(query.shape[-1])
