"""MCTF (Lee et al., "Multi-criteria Token Fusion with One-step-ahead Attention", arXiv 2403.10030).

Written from the paper, for timm's plain vision transformers with a class token, without training. Tokens are fused
between two blocks, by the attention that the second pays to them: its queries and keys are of the tokens before the
fusion, all that follows is of the fused ones. Where the paper is open:

- similarity is that of the tokens themselves;
- attention is proportional to the tokens' sizes, and averaged over heads and queries for what a token receives;
- the fused tokens' map adds up columns, and averages rows by size;
- a fused token is the mean by size, and receives the sum of what its members did;
- attraction is computed anew for the second direction;
- the class token is never fused.

The benchmark command finds it with this folder's parent on the path:

    PYTHONPATH=benchmarks evopatch benchmark --model deit_small_patch16_224 --peer benchmarks/peers/mctf.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peers.token_merging import Merging, log_sizes, mildest, rows_at
from torch import Tensor, nn

from evopatch.patching.handle import shared_copy

NAME = "MCTF"
SIMILARITY, INFORMATIVENESS, SIZE = 1, 1 / 20, 1 / 40
"""Temperatures: the exponents of the criteria."""


class MCTF(Merging):
    """A vision transformer that fuses `r` pairs of tokens before every block but the first.

    Args:
        model: As for `Merging`.
        r: Pairs; fewer where fewer than `2r` patch tokens are left.
    """

    def __init__(self, model: Any, r: int) -> None:
        super().__init__(model)
        self.r = r

    def _block(self, index: int, block: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        attention = block.attn
        weight = attention.qkv.weight.split(x.shape[-1])
        bias = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.split(x.shape[-1])

        def heads(x: Tensor, which: int) -> Tensor:
            return F.linear(x, weight[which], bias[which]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

        normed = block.norm1(x)
        query, key = attention.q_norm(heads(normed, 0)), attention.k_norm(heads(normed, 1))
        logits = query * attention.scale @ key.transpose(-2, -1)
        attended = (logits if size is None else logits + log_sizes(size)).softmax(-1)
        if index > 0 and self.r > 0:
            x, size, attended = fuse(x, size, attended, self.r)
            normed = block.norm1(x)
        out = (attention.attn_drop(attended) @ heads(normed, 2)).transpose(1, 2).flatten(2)
        x = x + block.drop_path1(block.ls1(attention.proj_drop(attention.proj(attention.norm(out)))))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size


def fuse(x: Tensor, size: Tensor | None, attended: Tensor, r: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fuse `r` pairs of patch tokens.

    Args:
        x: `(B, N, C)`, the class token first.
        size: `(B, N, 1)`, or None where every token stands for one patch.
        attended: `(B, heads, N, N)`, attention of every token to every other.
        r: How many; fewer where fewer than `2r` patch tokens are left.

    Returns:
        The same for `N - r` tokens.
    """
    batch, tokens, _ = x.shape
    r = min(r, (tokens - 1) // 2)
    if r <= 0:
        return x, size, attended
    if size is None:
        size = x.new_ones(batch, tokens, 1)
    group = matching(x, size, attended.mean((1, 2)).unsqueeze(-1), r)
    fused, weighted = (total(values, group, tokens - r) for values in (size, x * size))
    columns = total(attended.transpose(-2, -1), group.unsqueeze(1), tokens - r)
    rows = total(columns.transpose(-2, -1) * size.unsqueeze(1), group.unsqueeze(1), tokens - r)
    return weighted / fused, fused, rows / fused.unsqueeze(1)


def matching(x: Tensor, size: Tensor, received: Tensor, r: int) -> Tensor:
    """Bidirectional bipartite soft matching: which of the fused tokens every token becomes a part of.

    Half of the pairs are found by the first half of the patch tokens, every second of them, looking for the one of the
    others that attracts it most; then the others, with what they took in, look among the rest of the first.

    Args:
        x: `(B, N, C)`.
        size: `(B, N, 1)`.
        received: `(B, N, 1)`, attention that the token receives.
        r: Pairs.

    Returns:
        `(B, N)` of `0 .. N - r - 1`, in the order of the tokens that stay where they are.
    """
    batch, tokens, _ = x.shape
    into = torch.arange(tokens, device=x.device).repeat(batch, 1)
    first, second = into[:, 1::2].clone(), into[:, 2::2].clone()
    values = torch.cat([x * size, size, received], dim=-1)
    for pairs in filter(None, (r - r // 2, r // 2)):
        sums = total(values, into, tokens)
        best, partner = attraction(rows_at(sums, first), rows_at(sums, second)).max(dim=-1)
        order = best.argsort(dim=1, descending=True)
        gone, stay = order[:, :pairs], order[:, pairs:].sort(dim=1).values
        into.scatter_(1, first.gather(1, gone), second.gather(1, partner.gather(1, gone)))
        first, second = second, first.gather(1, stay)
    stays = into == torch.arange(tokens, device=x.device)
    into = into.gather(1, into)  # what went over in the first direction may have moved on in the second
    return (stays.cumsum(1) - 1).gather(1, into)


def attraction(first: Tensor, second: Tensor) -> Tensor:
    """The logarithm of how much every token of one side and every one of the other should be fused.

    Args:
        first: `(B, N, C + 2)`: token times size, size, attention received.
        second: `(B, M, C + 2)`, the same.

    Returns:
        `(B, N, M)`.
    """
    unit = [F.normalize(side[..., :-2].detach(), dim=-1) for side in (first, second)]
    similarity = (unit[0] @ unit[1].transpose(1, 2) + 1) / 2
    own, other = (SIZE * side[..., -2].log() + INFORMATIVENESS * side[..., -1].log() for side in (first, second))
    return SIMILARITY * similarity.clamp(min=1e-6).log() - own.unsqueeze(2) - other.unsqueeze(1)


def total(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums by group: `(..., N, W)` with groups `(..., N)`, that broadcast, to `(..., groups, W)`."""
    zeros = values.new_zeros(*values.shape[:-2], groups, values.shape[-1])
    return zeros.scatter_add(-2, group.unsqueeze(-1).expand_as(values), values)


def at_flops(model: nn.Module, image: Tensor, flops: int) -> MCTF:
    """The mildest fusion that needs no more FLOPs than given; the rest as for `mildest`."""
    own = shared_copy(model)
    return mildest(lambda r: MCTF(own, r), range(1, 200), image, flops)
