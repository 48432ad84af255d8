"""Token merging (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461), to compare with.

Written from the paper, for timm's plain vision transformers with a class token, without training: sections are the
paper's. Given to the benchmark command as

    evopatch benchmark --model deit_small_patch16_224 --peer benchmarks/peers/token_merging.py
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evopatch.measure.profiling import count_flops
from evopatch.patching.handle import shared_copy

NAME = "token merging"


class TokenMerging(nn.Module):
    """A vision transformer that merges `r` pairs of tokens in every block.

    Args:
        model: timm's `VisionTransformer`; its weights are shared.
        r: Pairs per block; fewer where fewer than `2r` patch tokens are left.
    """

    def __init__(self, model: Any, r: int) -> None:
        super().__init__()
        self.model = model
        self.r = r

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, height, width)` to logits."""
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        size = None  # `(B, N, 1)`: how many patches a token stands for; None: one each
        for block in model.blocks:
            x, size = self._block(block, x, size)
        out: Tensor = model.forward_head(model.norm(x))
        return out

    def _block(self, block: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change, key = _attention(block.attn, block.norm1(x), size)
        x = x + block.drop_path1(block.ls1(change))
        # Between attention and MLP (section 3, "strategy").
        x, size = merge(x, size, key.mean(1), self.r)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size


def _attention(attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Proportional attention (equation 1): a token's key counts as many times as the patches that it stands for."""
    batch, tokens, channels = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    bias = None if size is None else size.log()[:, None, None, :, 0].to(query.dtype)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=attention.scale)
    out = out.transpose(1, 2).reshape(batch, tokens, channels)
    return attention.proj_drop(attention.proj(attention.norm(out))), key


def merge(x: Tensor, size: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor | None]:
    """Bipartite soft matching (section 3): every second token looks for its most similar other; the best `r` merge.

    Args:
        x: `(B, N, C)`, the class token first.
        size: `(B, N, 1)`, or None where every token stands for one patch.
        metric: `(B, N, D)`, what the tokens are compared by: the keys, averaged over heads.
        r: How many.

    Returns:
        `(B, N - r, C)` and `(B, N - r, 1)`.
    """
    batch, tokens, _ = x.shape
    r = min(r, (tokens - 1) // 2)
    if r <= 0:
        return x, size
    if size is None:
        size = x.new_ones(batch, tokens, 1)
    unit = F.normalize(metric.detach(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    best, partner = scores.max(dim=-1)
    best = torch.cat([best.new_full((batch, 1), -math.inf), best[:, 1:]], dim=1)  # the class token stays alone
    order = best.argsort(dim=1, descending=True)
    merged, alone = order[:, :r], order[:, r:].sort(dim=1).values
    partner = partner.gather(1, merged)

    def combine(values: Tensor) -> Tensor:
        width = values.shape[-1]
        own, others = values[:, ::2], values[:, 1::2]
        own_merged = own.gather(1, merged.unsqueeze(-1).expand(-1, -1, width))
        others = others.scatter_add(1, partner.unsqueeze(-1).expand(-1, -1, width), own_merged)
        return torch.cat([own.gather(1, alone.unsqueeze(-1).expand(-1, -1, width)), others], dim=1)

    size, weighted = combine(size), combine(x * size)
    return weighted / size, size


def at_flops(model: nn.Module, image: Tensor, flops: int) -> nn.Module:
    """The mildest merging that needs no more FLOPs than given, for one image.

    Raises:
        ValueError: If no number of pairs per block gets there.
    """
    merging = TokenMerging(shared_copy(model), r=1).eval()
    for merging.r in range(1, 200):
        with torch.no_grad():
            found, _ = count_flops(lambda: merging(image))
        if found <= flops:
            return merging
    raise ValueError(f"token merging doesn't get to {flops} FLOPs")
