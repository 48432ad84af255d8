"""timm's SAM encoders: flat transformers of which most blocks attend inside windows, some over the whole map."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer_sam import Block, VisionTransformerSAM, get_decomposed_rel_pos_bias, get_rel_pos
from torch import Tensor, nn

from evopatch.errors import UnsupportedModelError
from evopatch.forward.host_state import HostState
from evopatch.forward.joined_blocks import RelativeBlocks
from evopatch.forward.spec import qualified
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks, passages
from evopatch.patching.window_changes import common_window, window_block_changes
from evopatch.rewrite.quiet import quietly
from evopatch.rewrite.tracing import TraceSpec

from .walks import SlowFastWindowed, grid_of


class SamBlocks(RelativeBlocks):
    """Of SAM."""

    def normed(self, attention: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return quietly(attention.q_norm, query), quietly(attention.k_norm, key)

    def between(self, attention: Any, length: int, table: Tensor) -> Tensor:
        between: Tensor = get_rel_pos(length, length, table)
        return between


class SamAdapter(Adapter):
    """timm's `samvit_*`."""

    mixin = SlowFastWindowed

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (VisionTransformerSAM,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        paths = [f"blocks.{index}" for index, _ in host.blocks.named_children()]
        for path in paths:
            _check(host.get_submodule(path), qualified(name, path))
        return HostSpec(
            blocks=(tuple((path,) for path in paths),),
            prefix=0,
            readout=0,
            taper=0.0,
            windowed=True,
            trace=TraceSpec(replaced={get_decomposed_rel_pos_bias: "relative_bias"}),
        )

    def plan(self, host: Any, state: HostState) -> list[Change]:
        changes = [Change(host, self.mixin, {"_evo_state": state}), *passages(host, state.index_of)]
        blocks = named_blocks(host, state)
        kind = SamBlocks(common_window((block for _, block in blocks), host.patch_embed.grid_size))
        for name, block in blocks:
            changes += window_block_changes(block, name, state, kind)
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        return grid_of(host, image_size)


def _check(block: Any, name: str) -> None:
    if not isinstance(block, Block):
        raise UnsupportedModelError(
            f"{name} is a {type(block).__qualname__}: expected a Block of timm's vision_transformer_sam. Leave the "
            "model unpatched"
        )
    if getattr(block.attn, "rope", None) is not None:
        raise UnsupportedModelError(
            f"{name}.attn has rotary positions, by place in a window or in the map: expected relative ones or none "
            "(use_rope=False). Leave the model unpatched"
        )
