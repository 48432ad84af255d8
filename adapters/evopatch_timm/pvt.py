"""timm PVT v2: a pyramid whose keys and values convolutions make of the whole map."""

from __future__ import annotations

from typing import Any

from timm.models.pvt_v2 import PyramidVisionTransformerStage, PyramidVisionTransformerV2
from torch import Tensor, nn

from evopatch.forward.host_state import HostState
from evopatch.forward.reduced_blocks import NOTICE, ConvolvingBlocks, first_selecting
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks, passages
from evopatch.patching.window_changes import window_block_changes
from evopatch.rewrite.quiet import quietly

from .features import SlowFastFeatures, features_of
from .walks import SlowFastWindowed


class PvtBlocks(ConvolvingBlocks):
    """Of PVT v2."""

    home = "timm.models.pvt_v2"
    attention = "attn"
    norm = "norm1"
    reducing = ("pool", "sr")
    projecting = ("kv",)
    widening = "fc1"
    activation = "act"
    compact = ("q", "attn_drop", "proj", "proj_drop", "fc1", "drop", "fc2")
    size_names = ("feat_size",)

    def sizes(self, grid: tuple[int, int]) -> tuple[Any, ...]:
        return (grid,)

    def grid(self, inputs: tuple[Any, ...]) -> tuple[int, int]:
        rows, columns = inputs[0]
        return rows, columns

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        heads = attention.num_heads
        queries = quietly(attention.q, query).unflatten(-1, (heads, -1)).transpose(1, 2)
        keys = quietly(attention.kv, key).unflatten(-1, (2, heads, -1))[:, :, 0].transpose(1, 2)
        logits: Tensor = queries * attention.scale @ keys.transpose(2, 3)
        return logits.squeeze(2)


PvtFeatures = features_of(PyramidVisionTransformerStage)


class PvtAdapter(Adapter):
    """timm's `pvt_v2_*`."""

    mixin = SlowFastWindowed
    notice = NOTICE

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (PyramidVisionTransformerV2, PvtFeatures)

    def inspect(self, host: Any, name: str) -> HostSpec:
        stages = [(p, m) for p, m in host.named_modules() if isinstance(m, PyramidVisionTransformerStage)]
        blocks = tuple(tuple((f"{path}.blocks.{i}",) for i in range(len(stage.blocks))) for path, stage in stages)
        start = first_selecting([len(stage) for stage in blocks])
        return HostSpec(blocks=blocks, prefix=0, readout=0, taper=0.0, start=start, windowed=True)

    def plan(self, host: Any, state: HostState) -> list[Change]:
        mixin = SlowFastFeatures if isinstance(host, PvtFeatures) else self.mixin
        changes = [Change(host, mixin, {"_evo_state": state}), *passages(host, state.index_of)]
        for name, block in named_blocks(host, state):
            changes += window_block_changes(block, name, state, PvtBlocks())
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = (-(-side // 4) for side in image_size)
        return rows, columns
