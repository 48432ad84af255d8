"""PVT, PVT v2 and SegFormer of transformers: pyramids whose keys and values convolutions make of the whole map."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import Tensor, nn

from evopatch.errors import UnsupportedModelError
from evopatch.forward.host_state import HostState
from evopatch.forward.reduced_blocks import NOTICE, ConvolvingBlocks, ReducedBlocks, first_selecting
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks, passages
from evopatch.patching.window_changes import window_block_changes
from evopatch.rewrite.quiet import quietly

from .families import loaded
from .sam import SlowFastEncoder
from .swin import Family, SwinAdapter


class PvtV2Blocks(ConvolvingBlocks):
    """Of PVT v2."""

    home = "transformers.models.pvt_v2.modeling_pvt_v2"
    attention = "attention"
    norm = "layer_norm_1"
    reducing = ("pool", "spatial_reduction")
    projecting = ("key", "value")
    widening = "dense1"
    activation = "intermediate_act_fn"
    compact = ("query", "attn_drop", "proj", "proj_drop", "dense1", "dense2", "dropout")

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        return _logits(quietly(attention.query, query), quietly(attention.key, key), attention.attention_head_size)


class PvtBlocks(ReducedBlocks):
    """Of PVT."""

    home = "transformers.models.pvt.modeling_pvt"
    attention = "attention"
    inside_attention = ("self",)
    norm = "layer_norm_1"
    reducing = ("sequence_reduction",)
    projecting = ("key", "value")
    compact = ("query", "dropout", "output")

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        own = attention.self
        return _logits(quietly(own.query, query), quietly(own.key, key), own.attention_head_size)


class SegformerBlocks(ConvolvingBlocks):
    """Of SegFormer."""

    home = "transformers.models.segformer.modeling_segformer"
    attention = "attention"
    norm = "layernorm_before"
    widening = "fc1"
    activation = "activation_fn"
    compact = ("q_proj", "o_proj", "fc1", "fc2", "dropout")

    def answering(self, attention: Any, everything: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        def answer(x: Tensor, *sizes: int) -> Any:
            return attention.sequence_reduction(everything, *grid) if reduces else everything

        # Keys are as many as there are tokens given, unless they are reduced.
        reduces = attention.sequence_reduction_ratio > 1
        return {"sequence_reduction": answer, "sequence_reduction_ratio": 2}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        return _logits(quietly(attention.q_proj, query), quietly(attention.k_proj, key), attention.head_dim)


def _logits(query: Tensor, key: Tensor, channels: int) -> Tensor:
    queries, keys = (x.unflatten(-1, (-1, channels)).transpose(1, 2) for x in (query, key))
    logits: Tensor = queries * channels**-0.5 @ keys.transpose(2, 3)
    return logits.squeeze(2)


class StagesAdapter(SwinAdapter):
    """PVT v2 and SegFormer, which loop over modules that are stages."""

    notice = NOTICE

    families: ClassVar[dict[tuple[str, str], Family]] = {
        ("pvt_v2.modeling_pvt_v2", "PvtV2Encoder"): Family(PvtV2Blocks),
        ("segformer.modeling_segformer", "SegformerModel"): Family(SegformerBlocks, stages="stages"),
    }

    def inspect(self, host: Any, name: str) -> HostSpec:
        patches, strides = list(host.config.patch_sizes), list(host.config.strides)
        if any(size % 2 == 0 for size in patches) or any(stride != 2 for stride in strides[1:]):
            raise UnsupportedModelError(
                f"{name} has patches of {patches} px, {strides} px apart: expected odd ones, and strides of 2 after "
                "the first, so that each map is half as fine as the one before. Leave the model unpatched"
            )
        spec = super().inspect(host, name)
        assert not isinstance(spec.blocks, str)
        return dataclasses.replace(spec, start=first_selecting([len(stage) for stage in spec.blocks]))

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        stride = host.config.strides[0]
        return -(-image_size[0] // stride), -(-image_size[1] // stride)


class PvtAdapter(Adapter):
    """PVT's encoder, which loops over all blocks. The last stage, with a class token, is as it was."""

    mixin = SlowFastEncoder
    notice = NOTICE

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return tuple(loaded({("pvt.modeling_pvt", "PvtEncoder"): None}))

    def inspect(self, host: Any, name: str) -> HostSpec:
        depths = [len(stage) for stage in host.block]
        blocks = tuple(tuple((f"block.{s}.{i}",) for i in range(depth)) for s, depth in enumerate(depths[:-1]))
        if sum(depths[:-1]) < 2:
            raise UnsupportedModelError(
                f"{name} (PvtEncoder) has {sum(depths[:-1])} block(s) before its last stage: expected at least two, as "
                "the first takes all tokens and the last stage is left alone. Leave the model unpatched"
            )
        size, sides = host.config.image_size, list(host.config.patch_sizes)
        if any(side != 2 for side in sides[1:-1]) or size % math.prod(sides[:-1]):
            raise UnsupportedModelError(
                f"{name} cuts images of {size} px by {sides}: expected maps of which each is half as fine as the one "
                "before, without a rest. Leave the model unpatched"
            )
        start = first_selecting(depths[:-1])
        return HostSpec(
            blocks=blocks,
            prefix=0,
            readout=0,
            later=1,
            coarser=sides[-1],
            taper=0.0,
            start=start,
            windowed=True,
        )

    def plan(self, host: Any, state: HostState) -> list[Change]:
        changes = [Change(host, self.mixin, {"_evo_state": state}), *passages(host, state.index_of)]
        for name, block in named_blocks(host, state):
            changes += window_block_changes(block, name, state, PvtBlocks())
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        side = host.config.patch_sizes[0]
        return image_size[0] // side, image_size[1] // side
