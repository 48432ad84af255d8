"""Tokens that a key padding mask leaves out of attention, as those that fill up a smaller image of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Masks that are added to the logits: what a model may take for minus infinity.
_BLOCKS = -1e4


class Padding(NamedTuple):
    """What a mask says."""

    left_out: Tensor
    """`(B or 1, T)` bool, True for tokens that no other token attends to."""
    consistent: Tensor
    """bool, no axes: whether the mask says nothing else."""


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the attention logits, in a floating-point type."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def padding_of(mask: Tensor, prefix: int) -> Padding:
    """The tokens that an attention mask leaves out, for all tokens that ask alike.

    What it says of tokens that are left out themselves doesn't matter.

    Args:
        mask: `(B or 1, H or 1, T or 1, T)`, as that of `scaled_dot_product_attention`: bool, True where a token
            attends, or a number that is added to the logits.
        prefix: `P`; prefix tokens can't be left out.
    """
    attends = mask if mask.dtype == torch.bool else mask == 0
    left_out = ~attends.flatten(1, 2).any(1)
    same = attends == ~left_out[:, None, None]
    if mask.dtype != torch.bool:
        same = same & (attends | (mask <= _BLOCKS))
    if mask.shape[2] > 1:
        same = same | left_out[:, None, :, None]
    consistent = same.all()
    return Padding(left_out, consistent & ~left_out[:, :prefix].any() if prefix else consistent)


def without(scores: Tensor, left_out: Tensor | None) -> Tensor:
    """Logits or scores with the smallest number for tokens that are left out: their softmax is 0, and no top has them.

    Args:
        scores: `(..., N)`.
        left_out: `(B, N)` bool, or broadcastable to the scores. None: none are.
    """
    return scores if left_out is None else scores.masked_fill(left_out, torch.finfo(scores.dtype).min)
