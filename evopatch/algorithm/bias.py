"""What is added to the attention logits of a compact set: sizes of its rows, and position biases."""

from __future__ import annotations

import torch
from torch import Tensor

from .partition import Partition, with_prefix
from .rows import aligned, filled_up


class KeyBias:
    """What is added to the logits of attention to each row, made once for all blocks of a run.

    Args:
        exact: `(B, M)` float32.
    """

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact
        self._made: dict[torch.dtype, Tensor] = {}

    def of(self, like: Tensor) -> Tensor:
        """`(B, 1, 1, M)`, of the type of queries, keys or logits."""
        if like.dtype not in self._made:
            self._made[like.dtype] = aligned(self.exact.to(like.dtype))[:, None, None]
        return self._made[like.dtype]


def key_bias_of(partition: Partition) -> KeyBias | None:
    """What is added to attention to each row of a compact set; None where nothing is."""
    exact = partition.key_bias()
    return None if exact is None else KeyBias(exact)


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
    leader = with_prefix(partition.leader, partition.group.shape[1] - partition.slow.shape[1])
    batch, leaders = leader.shape
    heads, tokens = bias.shape[1:3]
    columns = filled_up(leader)
    pairs = leader.unsqueeze(2) * tokens + columns.unsqueeze(1)
    own = pairs.view(batch, 1, -1).expand(-1, heads, -1)
    compact = bias.flatten(2).expand(batch, -1, -1).gather(2, own)
    compact = compact.view(batch, heads, leaders, columns.shape[1])
    if columns is not leader:
        compact = compact[..., :leaders]
    if not partition.one_for_all():
        return compact
    share = partition.weight.masked_fill(partition.group != leaders, 0.0).to(bias.dtype)
    row, column = _shared(share, bias), _shared(share, bias.transpose(2, 3))
    corner = torch.einsum("bs,bhs->bh", share, row)[:, :, None, None]
    own = leader.unsqueeze(1).expand(-1, heads, -1)
    row, column = row.gather(2, own).unsqueeze(2), column.gather(2, own).unsqueeze(3)
    # Under one name, as these are the largest tensors of a block.
    compact = torch.cat([compact, column], dim=3)
    return torch.cat([compact, torch.cat([row, corner], dim=3)], dim=2)


def _shared(share: Tensor, bias: Tensor) -> Tensor:
    """Means over the third axis of `(1 or B, H, T, T)`, weighted by `(B, T)`: `(B, H, T)`."""
    # A bias that is the same for all images isn't copied for each.
    if bias.shape[0] == 1:
        return torch.einsum("bt,hts->bhs", share, bias[0])
    return torch.einsum("bt,bhts->bhs", share, bias)
