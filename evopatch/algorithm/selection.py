"""Which tokens are slow, and whom the fast ones follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedInputError
from .padding import without
from .partition import Partition, with_prefix
from .rows import filled_up, is_fixed, limited, on_accelerator, rounded_share, row_sums, top, whole


def num_slow(num_patches: int, keep_ratio: float) -> int:
    """`K`, a fixed function of the number of patch tokens and the keep ratio, at least 1 and less than `N`.

    Raises:
        UnsupportedInputError: With fewer than two patch tokens there is nothing to choose from.
    """
    if is_fixed(num_patches) and num_patches < 2:
        raise UnsupportedInputError(
            f"{num_patches} patch token(s): expected at least 2 to split them into slow and fast ones; "
            "use a larger image or keep_ratio=1.0"
        )
    return limited(rounded_share(num_patches, keep_ratio), 1, num_patches - 1)


def select_top(g: Tensor, keep: int, prefix: int, representative: bool, left_out: Tensor | None = None) -> Partition:
    """The paper's selection (section 3.2): the `K` patch tokens of largest accumulated class attention are slow.

    Args:
        g: `(B, N)` float32.
        keep: `K`, less than `N`.
        prefix: `P`.
        representative: True: the fast tokens share one row, their mean weighted by `g` (equation 5).
            False: nothing stands in for them.
        left_out: `(B, N)` bool, tokens that are neither slow nor stood in for.
    """
    batch = g.shape[0]
    index = top(without(g, left_out), keep)
    order = torch.arange(keep, device=g.device).expand(batch, keep)
    group = torch.full_like(g, keep, dtype=torch.int64).scatter(1, index, order)
    rows = keep + int(representative)
    if left_out is not None:
        group = group.masked_fill(left_out, rows)
    slow = group < keep
    tiny = torch.finfo(g.dtype).tiny
    fast = g.clamp_min(tiny).masked_fill(slow if left_out is None else group != keep, 0.0)
    weight = fast / fast.sum(1, keepdim=True).clamp_min(tiny) if representative else torch.zeros_like(g)
    weight = weight.masked_fill(slow, 1.0)
    empty = None
    if left_out is not None:
        empty = left_out.gather(1, index)
        if representative:
            empty = torch.cat([empty, (group != keep).all(1, keepdim=True)], dim=1)
        empty = F.pad(empty, (prefix, 0), value=False)
    group, weight = with_prefix(group, prefix), F.pad(weight, (prefix, 0), value=1.0)
    complete = representative and left_out is None
    return Partition(group, weight, slow, None, prefix + rows, index, complete, empty)


def similarities(rows: Tensor, columns: Tensor) -> Tensor:
    """Products of vectors `(B, N, C)` and `(B, L, C)`: `(B, N, L)`."""
    wide = columns
    # In eager mode a copy is a kernel of its own, and takes as long as it saves where it is larger than the products.
    if on_accelerator(columns) and (torch.compiler.is_compiling() or columns.shape[1] > columns.shape[2]):
        wide = filled_up(columns, axis=-2)
    products = torch.bmm(wide if rows is columns else rows, wide.transpose(1, 2))
    return products if wide is columns else products[:, : rows.shape[1], : columns.shape[1]]


def select_matched(
    g: Tensor, features: Tensor, keep: int, prefix: int, importance: float, left_out: Tensor | None = None
) -> Partition:
    """Matched representatives: every fast token joins the slow token most similar to it.

    What would be lost if token `i` were fast is its importance times how little of it a *more important* token
    already says: `g_i ** importance * (1 - max_{j: g_j > g_i} <f_i, f_j>)`. The `K` tokens of largest loss are slow.
    A group's row is the mean of its members weighted by `sqrt(g)`, in whole steps (see `rows.whole`).

    Args:
        g: `(B, N)` float32.
        features: `f`, `(B, N, C)` of length 1: what the tokens are compared by.
        keep: `K`, less than `N`.
        prefix: `P`.
        importance: The exponent, at least 0.
        left_out: `(B, N)` bool, tokens that are neither slow nor members of a group.
    """
    batch, patches = g.shape
    if left_out is not None:
        g = g.masked_fill(left_out, 0.0)  # more important than none
    # In pieces of so many rows that they need less memory than a block's MLP, however many tokens there are. A program
    # that is recorded for any number of tokens takes them in one piece.
    step = 2 * features.shape[-1]
    pieces = is_fixed(patches) and patches > step
    redundancy = []
    for rows, own in zip(features.split(step, 1), g.split(step, 1), strict=True) if pieces else [(features, g)]:
        similarity = similarities(rows, features)
        less_important = g.unsqueeze(1) <= own.unsqueeze(2)
        redundancy.append(similarity.masked_fill(less_important, torch.finfo(similarity.dtype).min).amax(dim=-1))
    most = torch.cat(redundancy, dim=1) if pieces else redundancy[0]
    loss = without(g.pow(importance) * (1.0 - most.float()), left_out)
    index = top(loss, keep)
    empty = None if left_out is None else left_out.gather(1, index)
    nobody = None if empty is None else empty.unsqueeze(1)
    # The similarity to the slow tokens only: the arg max is the row of the compact set.
    if pieces:
        chosen = features.gather(1, index.unsqueeze(2).expand(batch, keep, features.shape[-1]))
        own = [without(similarities(rows, chosen), nobody).argmax(dim=-1) for rows in features.split(step, dim=1)]
        group = torch.cat(own, dim=1)
    else:
        near = similarity.gather(2, index.unsqueeze(1).expand(batch, patches, keep))
        group = without(near, nobody).argmax(dim=-1)
    group = group.scatter(1, index, torch.arange(keep, device=g.device).expand(batch, keep))
    slow = index.gather(1, group) == torch.arange(patches, device=g.device)
    rows_there = prefix + keep
    if left_out is not None:
        slow, group, rows_there = slow & ~left_out, group.masked_fill(left_out, keep), rows_there + 1
    group = with_prefix(group, prefix)
    share = whole(g.clamp_min(torch.finfo(g.dtype).tiny).sqrt())
    if prefix:
        share = F.pad(share, (prefix, 0), value=1.0)
    total, size = row_sums(group, rows_there, share, torch.ones_like(share))
    weight = share / total.gather(1, group)
    if empty is None:
        return Partition(group, weight, slow, size.log(), prefix + keep, index)
    log_size, empty = size[:, :-1].clamp_min(1.0).log(), F.pad(empty, (prefix, 0), value=False)
    return Partition(group, weight, slow, log_size, prefix + keep, index, complete=False, empty=empty)
