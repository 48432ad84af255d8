"""What is to know about the windowed blocks of transformers: Swin, Swin V2, and the copies of them in other models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from evopatch.algorithm.window_bias import continuous_bias, cosine_logits, shift_mask
from evopatch.algorithm.windows import Windows
from evopatch.forward.window_blocks import BiasedBlocks, Cut, MaskByHead
from evopatch.rewrite.quiet import quietly
from evopatch.rewrite.view import Call, View


class SwinBlocks(BiasedBlocks):
    """Swin: norm before attention, a module of its own for position biases from a table."""

    attention = "attention"
    norm: str | None = "layernorm_before"
    single: Mapping[str, Any] = {"window_size": 1, "shift_size": 0}
    flat = True

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        if not options.get("always_partition"):
            block.set_shift_and_window_size(inputs[0])  # as the block itself does now
        return _cut(block, x, inputs[0])

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        out, _ = block.forward(x, (x.shape[1], 1), **{**options, "always_partition": True})
        return out, (None,)

    def bias(self, attention: Any) -> Tensor:
        bias: Tensor = attention.relative_position_bias()
        return bias.squeeze(0)

    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        return View(attention, {"relative_position_bias": lambda: bias}), {}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries = quietly(attention.q_proj, query).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        keys = quietly(attention.k_proj, key).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        logits: Tensor = queries * attention.scaling @ keys.transpose(2, 3)
        return logits.squeeze(2)


class _InnerAttention(SwinBlocks):
    """Attention in a module `self` of the attention module."""

    inside_attention = ("self",)

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        return _cut(block, x, inputs[0])

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        (out,) = block.forward(x, (x.shape[1], 1))
        return out, ()

    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        # Its own bias is that of a single place then, the same for all: no matter to a softmax.
        inner = attention.self
        alone = {"window_size": (1, 1), "relative_position_index": inner.relative_position_index[:1, :1]}
        seen = Call(inner, View(inner, alone | self.of_no_bias(inner)).instead)
        return View(attention, {"self": seen}), {"attention_mask": MaskByHead(bias)}

    def of_no_bias(self, inner: Any) -> dict[str, Any]:
        """What stands for what made the bias, and ran already."""
        return {}


class TableBlocks(_InnerAttention):
    """Swin as MaskFormer has it: norm before attention, position biases from a table."""

    def bias(self, attention: Any) -> Tensor:
        inner = attention.self
        bias: Tensor = inner.relative_position_bias_table[inner.relative_position_index].permute(2, 0, 1)
        return bias

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = _projected(attention.self, query, key)
        logits: Tensor = queries * attention.self.attention_head_size**-0.5 @ keys.transpose(2, 3)
        return logits.squeeze(2)


class ShrinkingBlocks(TableBlocks):
    """The same as Donut and CLAP have it: windows larger than the map become as large as it."""

    def inputs(self, grid: tuple[int, int]) -> tuple[Any, ...]:
        return grid, False, False

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        grid, _, always_partition = inputs
        if not always_partition:
            block.set_shift_and_window_size(grid)  # as the block itself does now
        return _cut(block, x, grid)

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        (out,) = block.forward(x, (x.shape[1], 1), always_partition=True)
        return out, ()


class SwinV2Blocks(_InnerAttention):
    """Swin V2 and Swin2SR: norm after attention, cosine attention, continuous position biases."""

    norm = None

    def bias(self, attention: Any) -> Tensor:
        inner = attention.self
        return continuous_bias(
            inner.continuous_position_bias_mlp, inner.relative_coords_table, inner.relative_position_index
        )

    def of_no_bias(self, inner: Any) -> dict[str, Any]:
        heads = inner.num_attention_heads
        return {"continuous_position_bias_mlp": lambda table: table.new_zeros(*table.shape[:-1], heads)}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = _projected(attention.self, query, key)
        return cosine_logits(queries, keys, attention.self.logit_scale).squeeze(2)


def _projected(inner: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys `(B, H, T, D)`."""
    queries = quietly(inner.query, query).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
    return queries, quietly(inner.key, key).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)


def _cut(layer: Any, x: Tensor, grid: tuple[int, int]) -> Cut:
    windows = Windows((grid[0], grid[1]), (layer.window_size,) * 2, (layer.shift_size,) * 2, pads_first=True)
    # The layers' own method takes other arguments in every model, and gives the same.
    return Cut(windows, shift_mask(windows, x))
