"""torchvision's Swin and Swin V2: stages of windowed blocks, with what merges patches between them in one sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlock,
)

from evopatch.errors import UnsupportedModelError
from evopatch.forward.host_state import HostState
from evopatch.forward.spec import qualified
from evopatch.forward.walk import PatchedHost, walk
from evopatch.forward.windowed import WindowedPass
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks, passages
from evopatch.patching.window_changes import window_block_changes

from .swin_blocks import SwinBlocks, SwinV2Blocks


class SlowFastSwin(PatchedHost):
    """Mixin of a patched torchvision Swin."""

    def forward(self, x: Tensor) -> Tensor:
        """The host's own, on slow-fast blocks."""
        out: Tensor = walk(self, "forward", x, compact=True, pass_class=WindowedPass)
        return out


class SwinAdapter(Adapter):
    """torchvision's `swin_*` and `swin_v2_*`."""

    mixin = SlowFastSwin

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (SwinTransformer,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        stages = []
        for number, stage in list(host.features.named_children())[1:]:  # after the stem
            if isinstance(stage, nn.Sequential):  # else it merges patches
                paths = [f"features.{number}.{index}" for index, _ in stage.named_children()]
                for path in paths:
                    _check(host.get_submodule(path), qualified(name, path))
                stages.append(tuple((path,) for path in paths))
        return HostSpec(blocks=tuple(stages), prefix=0, readout=0, taper=0.0, windowed=True)

    def plan(self, host: nn.Module, state: HostState) -> list[Change]:
        changes = [Change(host, self.mixin, {"_evo_state": state}), *passages(host, state.index_of)]
        for name, block in named_blocks(host, state):
            second = isinstance(block.get_submodule("attn"), ShiftedWindowAttentionV2)
            changes += window_block_changes(block, name, state, SwinV2Blocks() if second else SwinBlocks())
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = host.features[0][0].kernel_size
        return image_size[0] // rows, image_size[1] // columns


def _check(block: nn.Module, name: str) -> None:
    attention = getattr(block, "attn", None)
    if not isinstance(block, SwinTransformerBlock) or not isinstance(attention, ShiftedWindowAttention):
        raise UnsupportedModelError(
            f"{name} is a {type(block).__qualname__} with a {type(attention).__qualname__} in `attn`: expected a "
            "SwinTransformerBlock with a ShiftedWindowAttention of torchvision. Leave the model unpatched"
        )
