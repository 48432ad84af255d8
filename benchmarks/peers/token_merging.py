"""Token merging (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461), to compare with.

Written from the paper, for timm's plain vision transformers with a class token, without training: sections are the
paper's. Given to the benchmark command as

    evopatch benchmark --model deit_small_patch16_224 --peer benchmarks/peers/token_merging.py
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evopatch.measure.profiling import count_flops
from evopatch.patching.handle import shared_copy

NAME = "token merging"
Peer = TypeVar("Peer", bound=nn.Module)


class Merging(nn.Module, ABC):
    """A vision transformer whose blocks get fewer and fewer tokens.

    Args:
        model: timm's `VisionTransformer`; its weights are shared.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, height, width)` to logits."""
        x, _ = self.features(images)
        out: Tensor = self.model.forward_head(self.model.norm(x))
        return out

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last block's tokens `(B, N, C)`, and how many patches each stands for, `(B, N, 1)`; None: one each."""
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        size = None
        for index, block in enumerate(model.blocks):
            x, size = self._block(index, block, x, size)
        return x, size

    @abstractmethod
    def _block(self, index: int, block: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The block of this index on `(B, N, C)` tokens and their sizes, to the same."""


class KeyMerging(Merging):
    """Merges between attention and MLP, by the attention's keys."""

    def _block(self, index: int, block: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change, key = proportional_attention(block.attn, block.norm1(x), size)
        x = x + block.drop_path1(block.ls1(change))
        # Between attention and MLP (section 3, "strategy").
        x, size = self._merge(index, x, size, key.mean(1))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size

    @abstractmethod
    def _merge(self, index: int, x: Tensor, size: Tensor | None, metric: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            index: Of the block.
            x: `(B, N, C)`.
            size: `(B, N, 1)` or None.
            metric: `(B, N, D)`, the keys, averaged over heads.
        """


class TokenMerging(KeyMerging):
    """A vision transformer that merges `r` pairs of tokens in every block.

    Args:
        model: As for `Merging`.
        r: Pairs per block; fewer where fewer than `2r` patch tokens are left.
    """

    def __init__(self, model: Any, r: int) -> None:
        super().__init__(model)
        self.r = r

    def _merge(self, index: int, x: Tensor, size: Tensor | None, metric: Tensor) -> tuple[Tensor, Tensor | None]:
        return merge(x, size, metric, self.r)


def proportional_attention(attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Proportional attention (equation 1): a token's key counts as many times as the patches that it stands for."""
    batch, tokens, channels = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    bias = None if size is None else log_sizes(size).to(query.dtype)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=attention.scale)
    out = out.transpose(1, 2).reshape(batch, tokens, channels)
    return attention.proj_drop(attention.proj(attention.norm(out))), key


def log_sizes(size: Tensor) -> Tensor:
    """What proportional attention adds to the logits `(B, heads, N, N)`, from `(B, N, 1)`."""
    return size.log()[:, None, None, :, 0]


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
        own, others = values[:, ::2], values[:, 1::2]
        index = partner.unsqueeze(-1).expand(-1, -1, values.shape[-1])
        others = others.scatter_add(1, index, rows_at(own, merged))
        return torch.cat([rows_at(own, alone), others], dim=1)

    size, weighted = combine(size), combine(x * size)
    return weighted / size, size


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """`(B, N, W)` at `(B, M)`: `(B, M, W)`."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def at_flops(model: nn.Module, image: Tensor, flops: int) -> nn.Module:
    """The mildest merging that needs no more FLOPs than given; arguments and errors as for `mildest`."""
    own = shared_copy(model)
    return mildest(lambda r: TokenMerging(own, r), range(1, 200), image, flops)


def mildest(make: Callable[[int], Peer], settings: Sequence[int], image: Tensor, flops: int) -> Peer:
    """The first setting that needs no more FLOPs than given, for one image.

    Args:
        make: Gives the model with that setting.
        settings: Each needs no more FLOPs than the one before.
        image: `(1, 3, height, width)`.
        flops: At most.

    Raises:
        ValueError: If there is none.
    """

    def suffices(setting: int) -> bool:
        with torch.no_grad():
            found, _ = count_flops(partial(make(setting).eval(), image))
        return found <= flops

    first = bisect_left(settings, True, key=suffices)
    if first == len(settings):
        raise ValueError(f"no setting gets to {flops} FLOPs")
    return make(settings[first]).eval()
