"""Who goes through the blocks for whom, and how tokens are merged into a compact set and put back.

Axes, in all of `evopatch.algorithm`: `B` images, `P` prefix tokens, `N` patch tokens in raster order, `T = P + N`
tokens, `C` channels, `H` heads, `K` slow tokens, `M` tokens of the compact set (prefix tokens, slow tokens and, with
one representative, that one).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .padding import without
from .rows import flat_rows, weighted_row_sums, written


# Without properties, which torch.compile before torch 2.11 doesn't follow in a tuple with names.
class Partition(NamedTuple):
    """Who goes through the blocks for whom, for every token of the sequence, prefix tokens included.

    `group[b, t]` is the row of the compact set that token `t` belongs to; unless `complete`, the row `M`, one past the
    end, means that nothing stands in for the token, or that a mask leaves it out. `weight[b, t]` is the token's share
    in its row, a weighted mean. A row's `log_size` is the logarithm of the number of tokens that it stands for, None
    where rows aren't weighted by size.
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
    empty: Tensor | None = None
    """`(B, M)` bool: rows that stand for no token, where a mask leaves so many out that fewer than `K` are left. None:
    no row is empty."""

    def one_for_all(self) -> bool:
        """Whether one row, the last, stands for all tokens that aren't slow."""
        return self.complete and self.log_size is None

    def key_bias(self) -> Tensor | None:
        """`(B, M)` float32, what is added to the logits of attention to each row; None where nothing is."""
        if self.empty is None:
            return self.log_size
        return without(self.weight.new_zeros(self.empty.shape) if self.log_size is None else self.log_size, self.empty)

    def rows_there(self) -> int:
        """`M`, and one more where a row takes the tokens that nothing stands in for."""
        return self.rows if self.complete else self.rows + 1

    def shown(self, behind: int) -> Partition:
        """The same of tokens of which the first ones stand behind all others.

        Args:
            behind: How many of the prefix tokens do.
        """
        if not behind:
            return self
        return self._replace(group=self.group.roll(-behind, 1), weight=self.weight.roll(-behind, 1))

    def appended(self, number: int) -> Partition:
        """Of tokens and rows behind which there are more, each of them a row of its own.

        Args:
            number: So many. `T` and `M` become as many more; only `group`, `weight` and `rows` are those then.
        """
        own = torch.arange(self.rows, self.rows + number, device=self.group.device)
        group = self.group if self.complete else self.group.masked_fill(self.group == self.rows, self.rows + number)
        group = torch.cat([group, own.expand(group.shape[0], number)], dim=1)
        return self._replace(group=group, weight=F.pad(self.weight, (0, number), value=1.0), rows=self.rows + number)

    def joined(self, windows: int) -> Partition:
        """Of tokens and rows that attend over several windows, each of which has an entry of its own here.

        Args:
            windows: So many entries that follow each other are one image: `B` becomes `B / windows`, `T` and `M` become
                `windows` times as many. Only `group`, `weight` and `rows` are those of whole images.
        """
        rows = torch.arange(windows, device=self.group.device).view(-1, 1) * self.rows
        group = self.group.view(-1, windows, self.group.shape[1])
        if not self.complete:
            rows = torch.where(group == self.rows, (windows - 1) * self.rows, rows)
        group, weight = (group + rows).flatten(1), self.weight.view(-1, windows * self.weight.shape[1])
        return self._replace(group=group, weight=weight, rows=windows * self.rows)

    def of_images(self, images: slice) -> Partition:
        """Of some of the images."""
        group, weight, slow = self.group[images], self.weight[images], self.slow[images]
        log_size, leader, empty = (
            None if tensor is None else tensor[images] for tensor in (self.log_size, self.leader, self.empty)
        )
        return self._replace(group=group, weight=weight, slow=slow, log_size=log_size, leader=leader, empty=empty)

    def to(self, device: torch.device) -> Partition:
        """The same on a device, for models spread over several."""
        if self.group.device == device:
            return self
        group, weight, slow = (tensor.to(device) for tensor in (self.group, self.weight, self.slow))
        log_size, leader, empty = (
            None if tensor is None else tensor.to(device) for tensor in (self.log_size, self.leader, self.empty)
        )
        return self._replace(group=group, weight=weight, slow=slow, log_size=log_size, leader=leader, empty=empty)


def with_prefix(group: Tensor, prefix: int) -> Tensor:
    """Prefix tokens are rows of their own, before all others."""
    if not prefix:
        return group
    own = torch.arange(prefix, device=group.device).expand(group.shape[0], prefix)
    return torch.cat([own, group + prefix], dim=1)


def merge(x: Tensor, partition: Partition) -> Tensor:
    """`(B, T, C)` tokens to the `(B, M, C)` compact set: each row the weighted mean of its tokens (equation 5)."""
    compact = weighted_row_sums(x, partition.weight, partition.group, partition.rows_there())
    # Contiguous, as blocks may take a view of it.
    return written(compact if partition.complete else compact[:, :-1])


def distribute(x: Tensor, change: Tensor, partition: Partition) -> Tensor:
    """Every token of `x` keeps its own value and adds the change of its row (equations 6 and 7).

    Args:
        x: `(B, T, C)`; or the tokens' `distances` from their rows.
        change: `(B, M, C)`; with distances the rows as they are after it.
    """
    return x + spread(change, partition)


def distances(x: Tensor, compact: Tensor, partition: Partition) -> Tensor:
    """How far tokens are from their rows, which stays the same while these change; of one without a row itself.

    Args:
        x: `(B, T, C)`.
        compact: `(B, M, C)`.
    """
    return x - spread(compact, partition)


def spread(x: Tensor, partition: Partition) -> Tensor:
    """`(B, M, C)` rows to `(B, T, C)`: every token the value of its row; zeros where nothing stands in for it."""
    if not partition.complete:
        x = F.pad(x, (0, 0, 0, 1))
    batch, rows, channels = x.shape
    own = x.reshape(-1, channels).index_select(0, flat_rows(partition.group, rows))
    return own.view(batch, partition.group.shape[1], channels)


def merge_positions(table: Tensor, partition: Partition, prefix: int) -> Tensor:
    """A positional input per patch token, averaged like the tokens.

    Rotary embeddings act linearly through their table of sines and cosines, so the mean over a row's places is what
    its mean token would see on average.

    Args:
        table: `(N, D)`, `(H, N, D)` (one per head), or with a batch axis before `(B, 1, N, D)` or `(B, H, N, D)`;
            or the same of `T` in place of `N`, with entries for prefix tokens.
        prefix: `P`.

    Returns:
        `(B, 1 or H, M - P, D)`, or of `M` where prefix tokens have entries.
    """
    batch = partition.group.shape[0]
    while table.dim() < 4:
        table = table.unsqueeze(0)
    heads, patches, channels = table.shape[1:]
    tokens = table.transpose(1, 2).reshape(-1, patches, heads * channels).expand(batch, -1, -1)
    if patches == partition.group.shape[1]:
        compact = merge(tokens, partition)
    else:
        compact = merge(F.pad(tokens, (0, 0, prefix, 0)), partition)[:, prefix:]
    return compact.view(batch, -1, heads, channels).transpose(1, 2)


def spread_pairs(values: Tensor, partition: Partition) -> Tensor:
    """What there is between any two rows of a compact set, as between any two tokens: each pair has that of its rows.

    Args:
        values: `(B, H, M, M)`.

    Returns:
        `(B, H, T, T)`, zeros where nothing stands for a token.
    """
    batch, heads = values.shape[:2]
    group = partition.group[:, None]
    tokens = group.shape[-1]
    padded = values if partition.complete else F.pad(values, (0, 1, 0, 1))
    rows = padded.gather(2, group.unsqueeze(-1).expand(batch, heads, tokens, padded.shape[-1]))
    return rows.gather(3, group.unsqueeze(2).expand(batch, heads, tokens, tokens))


def merge_pairs(values: Tensor, partition: Partition) -> Tensor:
    """The inverse of `spread_pairs`: means over the pairs of two rows' tokens.

    Args:
        values: `(B, H, T, T)`.

    Returns:
        `(B, H, M, M)`.
    """
    return _merged(values, partition, partition)


def spread_attention(weights: Tensor, partition: Partition) -> Tensor:
    """Attention between the rows of a compact set, as attention between all tokens.

    A token attends as its row does, and a row's share is split among its tokens as they are in the row's mean. Tokens
    that nothing stands for neither attend nor are attended to: zeros.

    Args:
        weights: `(B, H, M, M)`, rows sum to 1.

    Returns:
        `(B, H, T, T)`, rows sum to 1 but for those zeros.
    """
    full = spread_pairs(weights, partition)
    return full * partition.weight[:, None, None].to(full.dtype)


def unspread_attention(weights: Tensor, partition: Partition) -> Tensor:
    """The inverse of `spread_attention`: a row attends as its tokens do on average, and is attended to as they are
    together.

    Args:
        weights: `(B, H, T, T)`.

    Returns:
        `(B, H, M, M)`.
    """
    return _merged(weights, partition, partition._replace(weight=torch.where(partition.weight > 0, 1.0, 0.0)))


def _merged(values: Tensor, down: Partition, across: Partition) -> Tensor:
    """`(B, H, T, T)` to `(B, H, M, M)`, by the weights of one partition and then of another."""
    batch, heads, tokens, _ = values.shape
    as_rows = merge(values.transpose(1, 2).reshape(batch, tokens, -1), down)
    as_rows = as_rows.view(batch, -1, heads, tokens).permute(0, 2, 3, 1)
    as_columns = merge(as_rows.transpose(1, 2).reshape(batch, tokens, -1), across)
    return as_columns.view(batch, across.rows, heads, -1).permute(0, 2, 3, 1)
