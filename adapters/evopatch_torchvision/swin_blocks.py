"""What is to know about the blocks of torchvision's Swin, whose attention cuts its map into windows by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evopatch.algorithm.window_bias import cosine_logits, shift_mask
from evopatch.algorithm.windows import Windows
from evopatch.forward.window_blocks import BiasedBlocks, Cut
from evopatch.rewrite.view import View


class SwinBlocks(BiasedBlocks):
    """Swin: norm before attention, position biases from a table."""

    attention = "attn"
    norm: str | None = "norm1"
    single: Mapping[str, Any] = {}

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        grid, window = (x.shape[1], x.shape[2]), tuple(block.attn.window_size)
        # An axis that one window covers isn't shifted.
        axes = zip(grid, window, block.attn.shift_size, strict=True)
        rows, columns = (0 if side <= size else shift for side, size, shift in axes)
        windows = Windows(grid, window, (rows, columns), pads_first=True)
        return Cut(windows, shift_mask(windows, x))

    def bias(self, attention: Any) -> Tensor:
        bias: Tensor = attention.get_relative_position_bias()
        return bias.squeeze(0)

    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        # Each window is a map of its own, cut into one window.
        own = {"window_size": [bias.shape[-1], 1], "shift_size": [0, 0], "get_relative_position_bias": lambda: bias}
        return View(attention, own), {}

    def laid_out(self, windows: Tensor) -> Tensor:
        return windows.unsqueeze(2)

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = _projected(attention, query, key, attention.qkv.bias)
        width: int = queries.shape[-1]
        logits: Tensor = queries * width**-0.5 @ keys.transpose(2, 3)
        return logits.squeeze(2)


class SwinV2Blocks(SwinBlocks):
    """Swin V2: norm after attention, cosine attention, continuous position biases."""

    norm = None

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        bias = attention.qkv.bias
        if bias is not None:  # keys have none
            asked, _, given = bias.chunk(3)
            bias = torch.cat([asked, torch.zeros_like(asked), given])
        queries, keys = _projected(attention, query, key, bias)
        return cosine_logits(queries, keys, attention.logit_scale).squeeze(2)


def _projected(attention: Any, query: Tensor, key: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and keys `(B, H, T, D)`, by the layer's weights, as the attention itself reads them."""
    qkv = (F.linear(x, attention.qkv.weight, bias) for x in (query, key))
    asked, answering = (x.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4) for x in qkv)
    return asked[0], answering[1]
