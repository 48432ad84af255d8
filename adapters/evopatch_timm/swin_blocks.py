"""What is to know about the windowed blocks of timm's Swin, Swin V2 and Swin V2 Cr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from evopatch.algorithm.window_bias import continuous_bias, cosine_logits
from evopatch.algorithm.windows import Windows
from evopatch.forward.window_blocks import BiasedBlocks, Cut, MaskByHead
from evopatch.rewrite.quiet import quietly
from evopatch.rewrite.view import View


class SwinBlocks(BiasedBlocks):
    """Swin: norm before attention, position biases from a table."""

    attention = "attn"
    norm: str | None = "norm1"
    single: Mapping[str, Any] = {
        "window_size": (1, 1),
        "window_area": 1,
        "shift_size": (0, 0),
        "attn_mask": None,
        "dynamic_mask": False,
    }

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        grid = (x.shape[1], x.shape[2])
        windows = Windows(grid, tuple(block.window_size), tuple(block.shift_size), pads_first=False)
        if not block.dynamic_mask:
            return Cut(windows, block.attn_mask)
        return Cut(windows, block.get_attn_mask(x.new_zeros(1, *windows.padded_grid, 1)))

    def bias(self, attention: Any) -> Tensor:
        bias: Tensor = attention._get_rel_pos_bias()
        return bias.squeeze(0)

    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        return View(attention, {"_get_rel_pos_bias": lambda: bias}), {}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = _projected(attention, query, key)
        logits: Tensor = queries * attention.scale @ keys.transpose(2, 3)
        return logits.squeeze(2)


class SwinV2Blocks(SwinBlocks):
    """Swin V2: norm after attention, cosine attention, continuous position biases."""

    norm = None

    def bias(self, attention: Any) -> Tensor:
        return continuous_bias(attention.cpb_mlp, attention.relative_coords_table, attention.relative_position_index)

    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        # Its own bias is that of a single place then, the same for all: no matter to a softmax. What makes it ran.
        alone = {"window_size": (1, 1), "relative_position_index": attention.relative_position_index[:1, :1]}
        alone["cpb_mlp"] = lambda table: table.new_zeros(*table.shape[:-1], attention.num_heads)
        return View(attention, alone), {"mask": MaskByHead(bias)}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        query, key = quietly(attention.qkv, query), quietly(attention.qkv, key)
        if attention.q_bias is not None:
            query = query + F.pad(attention.q_bias, (0, 2 * attention.dim))
        queries, keys = _heads(attention, query)[0], _heads(attention, key)[1]
        return cosine_logits(queries, keys, attention.logit_scale).squeeze(2)


class SwinV2CrBlocks(SwinV2Blocks):
    """Swin V2 as timm had it first: some blocks end with a norm on the main branch."""

    last = "norm3"

    def bias(self, attention: Any) -> Tensor:
        bias: Tensor = attention._relative_positional_encodings()
        return bias.squeeze(0)

    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        return View(attention, {"_relative_positional_encodings": lambda: bias}), {}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = _projected(attention, query, key)
        return cosine_logits(queries, keys, attention.logit_scale.view(-1, 1, 1)).squeeze(2)


def _projected(attention: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return _heads(attention, quietly(attention.qkv, query))[0], _heads(attention, quietly(attention.qkv, key))[1]


def _heads(attention: Any, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys `(B, H, T, D)`."""
    q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k
