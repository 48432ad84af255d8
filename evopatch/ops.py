"""The algorithm, as pure tensor functions: score, select, merge, distribute.

Axes: `B` images, `P` prefix tokens, `N` patch tokens in raster order, `T = P + N` tokens, `C` channels, `H` heads,
`K` slow tokens, `M` tokens of the compact set (prefix tokens, slow tokens and, with one representative, that one).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedInputError


class Partition(NamedTuple):
    """Who goes through the blocks for whom, for every token of the sequence, prefix tokens included.

    `group[b, t]` is the row of the compact set that token `t` belongs to; unless `complete`, the row `M`, one past the
    end, means that nothing stands in for the token. `weight[b, t]` is the token's share in its row, a weighted mean. A
    row's `log_size` is the logarithm of the number of tokens that it stands for, None where rows aren't weighted by
    size.
    """

    group: Tensor
    """`(B, T)` int64."""
    weight: Tensor
    """`(B, T)` float32."""
    slow: Tensor
    """`(B, N)` bool, True for the patch tokens that are slow."""
    log_size: Tensor | None
    """`(B, M)` float32, or None."""
    rows: int
    """`M`."""
    leader: Tensor | None = None
    """`(B, K)` int64, the slow patch tokens in the order of their rows, which come after those of the prefix tokens.
    None in windows, whose rows have places of their own."""
    complete: bool = True
    """Whether every token has a row."""

    @property
    def rows_there(self) -> int:
        """`M`, and one more where a row takes the tokens that nothing stands in for."""
        return self.rows if self.complete else self.rows + 1

    def to(self, device: torch.device) -> Partition:
        """The same on a device, for models spread over several."""
        if self.group.device == device:
            return self
        group, weight, slow = (tensor.to(device) for tensor in (self.group, self.weight, self.slow))
        log_size, leader = (None if tensor is None else tensor.to(device) for tensor in (self.log_size, self.leader))
        return self._replace(group=group, weight=weight, slow=slow, log_size=log_size, leader=leader)


def num_slow(num_patches: int, keep_ratio: float) -> int:
    """`K`, a fixed function of the number of patch tokens and the keep ratio, at least 1 and less than `N`.

    Raises:
        UnsupportedInputError: With fewer than two patch tokens there is nothing to choose from.
    """
    if num_patches < 2:
        raise UnsupportedInputError(
            f"{num_patches} patch token(s): expected at least 2 to split them into slow and fast ones; "
            "use a larger image or keep_ratio=1.0"
        )
    return min(max(1, int(num_patches * keep_ratio + 0.5)), num_patches - 1)


def class_attention(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None, share: Tensor | None = None
) -> Tensor:
    """Attention of the readout over all tokens, averaged over heads: one row of the softmax, not the whole matrix.

    Args:
        query: `(B, H, R, D)`, the queries of the tokens that the head reads: the class token, class and distillation
            token, or all patch tokens where the head averages them. Of the latter their mean query is used.
        key: `(B, H, M, D)`.
        scale: Factor on the logits, `D ** -0.5` as a rule.
        bias: Added to the logits, broadcastable to `(B, H, R, M)`: log sizes and position biases.
        share: `(B, R)`, sums to 1 over `R`: take the mean query weighted so. None: attend with each query, then
            average the attention.

    Returns:
        `(B, M)` float32, sums to 1 (section 3.2 of the paper: the class attention averaged over heads).
    """
    query, key = _constant(query), _constant(key)
    if share is not None:
        query = torch.einsum("br,bhrd->bhd", share.to(query.dtype), query).unsqueeze(2)
        if bias is not None and bias.shape[-2] > 1:
            bias = torch.einsum("br,bhrm->bhm", share.to(bias.dtype), bias.expand(share.shape[0], -1, -1, -1))
            bias = bias.unsqueeze(2)
    # At batch 1 operator calls count: this product of all heads is a third of those of one over four axes.
    query, heads = query.flatten(0, 1), key.shape[:2]
    logits = torch.baddbmm(query[:, :, :1], query, key.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    logits = logits.view(*heads, *logits.shape[1:])
    if bias is not None:
        logits = logits + _constant(bias)
    return logits.softmax(dim=-1, dtype=torch.float32).mean(dim=(1, 2))


def _constant(x: Tensor) -> Tensor:
    """Without a gradient."""
    return x.detach() if x.requires_grad else x


def accumulate(g: Tensor | None, attention: Tensor, tradeoff: float) -> Tensor:
    """Equation 4: `g_l = (1 - t) * g_{l-1} + t * a_l`; the first observation is taken whole.

    Args:
        g: `(B, N)` float32, or None before the first block.
        attention: `(B, N)` float32.
        tradeoff: `t` in [0, 1].
    """
    return attention if g is None else torch.lerp(g, attention, tradeoff)


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
        return torch.lerp(g, (attention * partition.log_size.neg().exp()).gather(1, group), tradeoff)
    member = F.pad(attention, (0, 1)).gather(1, group)
    return torch.where(partition.slow, torch.lerp(g, member, tradeoff), g)


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


def select_top(g: Tensor, keep: int, prefix: int, representative: bool) -> Partition:
    """The paper's selection (section 3.2): the `K` patch tokens of largest accumulated class attention are slow.

    Args:
        g: `(B, N)` float32.
        keep: `K`, less than `N`.
        prefix: `P`.
        representative: True: the fast tokens share one row, their mean weighted by `g` (equation 5).
            False: nothing stands in for them.
    """
    batch = g.shape[0]
    index = g.topk(keep, dim=1, sorted=False).indices
    slow = torch.zeros_like(g, dtype=torch.bool).scatter(1, index, 1)
    order = torch.arange(keep, device=g.device).expand(batch, keep)
    group = torch.full_like(g, keep, dtype=torch.int64).scatter(1, index, order)
    fast = torch.where(slow, 0.0, g.clamp_min(torch.finfo(g.dtype).tiny))
    weight = fast / fast.sum(1, keepdim=True) if representative else torch.zeros_like(g)
    weight = torch.where(slow, 1.0, weight)
    group, weight = _with_prefix(group, prefix), F.pad(weight, (prefix, 0), value=1.0)
    return Partition(group, weight, slow, None, prefix + keep + representative, index, complete=representative)


def select_matched(g: Tensor, metric: Tensor, keep: int, prefix: int, importance: float) -> Partition:
    """Matched representatives: every fast token joins the slow token most similar to it.

    What would be lost if token `i` were fast is its importance times how little of it a *more important* token
    already says: `g_i ** importance * (1 - max_{j: g_j > g_i} <f_i, f_j>)`, with `f` the normalised metric. The `K`
    tokens of largest loss are slow. A group's row is the mean of its members weighted by `sqrt(g)`.

    Args:
        g: `(B, N)` float32.
        metric: `(B, N, C)`, what the tokens are compared by.
        keep: `K`, less than `N`.
        prefix: `P`.
        importance: The exponent, at least 0.
    """
    batch, patches = g.shape
    unit = F.normalize(_constant(metric), dim=-1)
    # In pieces of so many rows that they need less memory than a block's MLP, however many tokens there are.
    step = 2 * unit.shape[-1]
    redundancy = []
    for rows, own in zip(unit.split(step, dim=1), g.split(step, dim=1), strict=True):
        similarity = rows @ unit.transpose(1, 2)
        less_important = g.unsqueeze(1) <= own.unsqueeze(2)
        redundancy.append(similarity.masked_fill(less_important, torch.finfo(similarity.dtype).min).amax(dim=-1))
    most = redundancy[0] if len(redundancy) == 1 else torch.cat(redundancy, dim=1)
    weighted = g.pow(importance)
    loss = torch.addcmul(weighted, weighted, most.float(), value=-1)
    index = loss.topk(keep, dim=1, sorted=False).indices
    slow = torch.zeros_like(g, dtype=torch.bool).scatter(1, index, 1)
    # The similarity to the slow tokens only: the arg max is the row of the compact set.
    if patches <= step:
        group = similarity.gather(2, index.unsqueeze(1).expand(batch, patches, keep)).argmax(dim=-1)
    else:
        slow_unit = unit.gather(1, index.unsqueeze(2).expand(batch, keep, unit.shape[-1])).transpose(1, 2)
        group = torch.cat([(rows @ slow_unit).argmax(dim=-1) for rows in unit.split(step, dim=1)], dim=1)
    order = torch.arange(keep, device=g.device).expand(batch, keep)
    group = _with_prefix(group.scatter(1, index, order), prefix)
    share = g.clamp_min(torch.finfo(g.dtype).tiny).sqrt()
    if prefix:
        share = F.pad(share, (prefix, 0), value=1.0)
    total = share.new_zeros(batch, prefix + keep)
    size = total.scatter_add(1, group, torch.ones_like(share))
    weight = share / total.scatter_add(1, group, share).gather(1, group)
    return Partition(group, weight, slow, size.log(), prefix + keep, index)


def _with_prefix(group: Tensor, prefix: int) -> Tensor:
    """Prefix tokens are rows of their own, before all others."""
    if not prefix:
        return group
    own = torch.arange(prefix, device=group.device).expand(group.shape[0], prefix)
    return torch.cat([own, group + prefix], dim=1)


def merge(x: Tensor, partition: Partition) -> Tensor:
    """`(B, T, C)` tokens to the `(B, M, C)` compact set: each row the weighted mean of its tokens (equation 5)."""
    batch, _, channels = x.shape
    rows = partition.rows_there
    weighted = x * partition.weight.unsqueeze(-1)
    compact = weighted.new_zeros(batch * rows, channels)
    compact = compact.index_add(0, _flat(partition.group, rows), weighted.reshape(-1, channels))
    compact = compact.view(batch, rows, channels).to(x.dtype)
    return compact if partition.complete else compact[:, :-1]


def distribute(x: Tensor, change: Tensor, partition: Partition) -> Tensor:
    """Every token of `x` keeps its own value and adds the change of its row (equations 6 and 7).

    Args:
        x: `(B, T, C)`.
        change: `(B, M, C)`.
    """
    if not partition.complete:
        change = F.pad(change, (0, 0, 0, 1))
    batch, rows, channels = change.shape
    own = change.reshape(-1, channels).index_select(0, _flat(partition.group, rows))
    return x + own.view(batch, -1, channels)


def _flat(group: Tensor, rows: int) -> Tensor:
    """Row numbers into the compact sets of all images laid end to end: whole rows are copied, not single elements."""
    offset = torch.arange(0, group.shape[0] * rows, rows, device=group.device).unsqueeze(1)
    return (group + offset).flatten()


def merge_positions(table: Tensor, partition: Partition, prefix: int) -> Tensor:
    """A positional input per patch token, averaged like the tokens.

    Rotary embeddings act linearly through their table of sines and cosines, so the mean over a row's places is what
    its mean token would see on average.

    Args:
        table: `(N, D)`, `(H, N, D)` (one per head), or with a batch axis before `(B, 1, N, D)` or `(B, H, N, D)`.
        prefix: `P`; the table has no entries for prefix tokens.

    Returns:
        `(B, 1 or H, M - P, D)`.
    """
    batch = partition.group.shape[0]
    while table.dim() < 4:
        table = table.unsqueeze(0)
    heads, patches, channels = table.shape[1:]
    tokens = table.transpose(1, 2).reshape(-1, patches, heads * channels).expand(batch, -1, -1)
    compact = merge(F.pad(tokens, (0, 0, prefix, 0)), partition)[:, prefix:]
    return compact.view(batch, -1, heads, channels).transpose(1, 2)


def merge_bias(bias: Tensor, partition: Partition) -> Tensor:
    """An attention bias per pair of tokens, for the rows of the compact set.

    A matched group has the bias of its slow token: the mean over its members, which lie close to each other, is no more
    accurate on real models and costs most of what the smaller attention saves. One representative stands for half of
    the image and has the mean over its members, weighted as they are in it.

    Args:
        bias: `(1 or B, H, T, T)`.

    Returns:
        `(B, H, M, M)`.
    """
    assert partition.leader is not None
    leader = _with_prefix(partition.leader, partition.group.shape[1] - partition.slow.shape[1])
    batch, leaders = leader.shape
    heads, tokens = bias.shape[1:3]
    bias = bias.expand(batch, -1, -1, -1)
    pairs = leader.unsqueeze(2) * tokens + leader.unsqueeze(1)
    pairs = pairs.view(batch, 1, -1).expand(-1, heads, -1)
    compact = bias.flatten(2).gather(2, pairs).view(batch, heads, leaders, leaders)
    if leaders == partition.rows:
        return compact
    share = torch.where(partition.group == leaders, partition.weight, 0.0).to(bias.dtype)
    row = torch.einsum("bt,bhts->bhs", share, bias)
    column = torch.einsum("bs,bhts->bht", share, bias)
    corner = torch.einsum("bs,bhs->bh", share, row)[:, :, None, None]
    own = leader.unsqueeze(1).expand(-1, heads, -1)
    row, column = row.gather(2, own).unsqueeze(2), column.gather(2, own).unsqueeze(3)
    return torch.cat([torch.cat([compact, column], dim=3), torch.cat([row, corner], dim=3)], dim=2)


def spread_attention(weights: Tensor, partition: Partition) -> Tensor:
    """Attention between the rows of a compact set, as attention between all tokens.

    A token attends as its row does, and a row's share is split among its tokens as they are in the row's mean. Tokens
    that nothing stands for neither attend nor are attended to: zeros.

    Args:
        weights: `(B, H, M, M)`, rows sum to 1.

    Returns:
        `(B, H, T, T)`, rows sum to 1 but for those zeros.
    """
    batch, heads = weights.shape[:2]
    group = partition.group[:, None]
    tokens = group.shape[-1]
    padded = weights if partition.complete else F.pad(weights, (0, 1, 0, 1))
    rows = padded.gather(2, group.unsqueeze(-1).expand(batch, heads, tokens, padded.shape[-1]))
    full = rows.gather(3, group.unsqueeze(2).expand(batch, heads, tokens, tokens))
    return full * partition.weight[:, None, None].to(full.dtype)


def default_scale(query: Tensor) -> float:
    """`D ** -0.5` for queries `(B, H, R, D)`."""
    return 1.0 / math.sqrt(query.shape[-1])
