"""PiToMe (Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", arXiv 2405.16148).

Written from the paper, for timm's plain vision transformers with a class token, without training. Where that is open:

- the keys are averaged over heads, as token merging's are;
- the class token is no part of the graph;
- blocks count from 1, so the margin falls to 0 in the last.

The benchmark command finds it with this folder's parent on the path:

    PYTHONPATH=benchmarks evopatch benchmark --model deit_small_patch16_224 --peer benchmarks/peers/pitome.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peers.token_merging import KeyMerging, mildest, rows_at
from torch import Tensor, nn

from evopatch.patching.handle import shared_copy

NAME = "PiToMe"


class PiToMe(KeyMerging):
    """A vision transformer that keeps a share of its tokens in every block.

    Args:
        model: As for `Merging`.
        ratio: The share that every block keeps; at least half.
    """

    def __init__(self, model: Any, ratio: float) -> None:
        super().__init__(model)
        self.ratio = ratio

    def _merge(self, index: int, x: Tensor, size: Tensor | None, metric: Tensor) -> tuple[Tensor, Tensor | None]:
        margin = 0.9 - 0.9 * (index + 1) / len(self.model.blocks)
        return merge(x, size, metric, x.shape[1] - round(self.ratio * x.shape[1]), margin)


def energy(similarity: Tensor, margin: float) -> Tensor:
    """How much of a crowd every token stands in: high for redundant ones. `(B, N, N)` cosines to `(B, N)`."""
    return torch.where(similarity >= margin, similarity, (similarity - margin).exp() - 1).mean(-1)


def merge(x: Tensor, size: Tensor | None, metric: Tensor, k: int, margin: float) -> tuple[Tensor, Tensor | None]:
    """Merge `k` of the `2k` patch tokens of highest energy with their most similar among the others of these.

    Args:
        x: `(B, N, C)`, the class token first.
        size: `(B, N, 1)`, or None where every token stands for one patch.
        metric: `(B, N, D)`, what the tokens are compared by.
        k: How many; fewer where fewer than `2k` patch tokens are left.
        margin: Of similarity, above which tokens count as the same.

    Returns:
        `(B, N - k, C)` and `(B, N - k, 1)`: the class token, the protected tokens, the merged ones.
    """
    batch, tokens, _ = x.shape
    k = min(k, (tokens - 1) // 2)
    if k <= 0:
        return x, size
    if size is None:
        size = x.new_ones(batch, tokens, 1)
    unit = F.normalize(metric[:, 1:].detach(), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    order = energy(similarity, margin).argsort(dim=1, descending=True)
    # Neighbours in the order of energy tend to be alike, so they go to different sides.
    own, others, protected = order[:, : 2 * k : 2], order[:, 1 : 2 * k : 2], order[:, 2 * k :].sort(dim=1).values
    between = rows_at(similarity, own).gather(2, others.unsqueeze(1).expand(-1, k, -1))
    partner = between.argmax(-1)

    def combine(values: Tensor) -> Tensor:
        patches = values[:, 1:]
        index = partner.unsqueeze(-1).expand(-1, -1, values.shape[-1])
        merged = rows_at(patches, others).scatter_add(1, index, rows_at(patches, own))
        return torch.cat([values[:, :1], rows_at(patches, protected), merged], dim=1)

    size, weighted = combine(size), combine(x * size)
    return weighted / size, size


def at_flops(model: nn.Module, image: Tensor, flops: int) -> PiToMe:
    """The mildest ratio, in thousandths, that needs no more FLOPs than given; the rest as for `mildest`."""
    own = shared_copy(model)
    return mildest(lambda thousandths: PiToMe(own, thousandths / 1000), range(999, 499, -1), image, flops)
