"""timm Swin, Swin V2 and Swin V2 Cr: pyramids of windowed blocks, whole or as the stages of a feature extractor."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformer, SwinTransformerStage
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Stage
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrStage
from torch import nn

from evopatch.forward.host_state import HostState
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks, passages
from evopatch.patching.window_changes import window_block_changes

from .features import SlowFastFeatures, features_of
from .swin_blocks import SwinBlocks, SwinV2Blocks, SwinV2CrBlocks
from .walks import SlowFastWindowed

_KINDS = {
    SwinTransformerStage: SwinBlocks,
    SwinTransformerV2Stage: SwinV2Blocks,
    SwinTransformerV2CrStage: SwinV2CrBlocks,
}


SwinFeatures = features_of(*_KINDS)


class SwinAdapter(Adapter):
    """All Swin models of timm."""

    mixin = SlowFastWindowed

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (SwinTransformer, SwinTransformerV2, SwinTransformerV2Cr, SwinFeatures)

    def inspect(self, host: Any, name: str) -> HostSpec:
        stages: list[tuple[str, Any]] = [(p, m) for p, m in host.named_modules() if isinstance(m, tuple(_KINDS))]
        blocks = tuple(tuple((f"{path}.blocks.{i}",) for i in range(len(stage.blocks))) for path, stage in stages)
        return HostSpec(blocks=blocks, prefix=0, readout=0, taper=0.0, windowed=True)

    def plan(self, host: nn.Module, state: HostState) -> list[Change]:
        mixin = SlowFastFeatures if isinstance(host, SwinFeatures) else self.mixin
        changes = [Change(host, mixin, {"_evo_state": state}), *passages(host, state.index_of)]
        for (path, *_), (name, block) in zip(state.blocks, named_blocks(host, state), strict=True):
            stage = host.get_submodule(path.partition(".blocks.")[0])
            kind = next(kind for cls, kind in _KINDS.items() if isinstance(stage, cls))
            changes += window_block_changes(block, name, state, kind())
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = host.get_submodule("patch_embed").patch_size
        return image_size[0] // rows, image_size[1] // columns
