"""SAM 3's vision transformer: layers inside windows, some over the whole map, all with rotary positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evopatch.forward.host_state import HostState
from evopatch.forward.joined_blocks import RotatedBlocks
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks, passages
from evopatch.patching.window_changes import common_window, window_block_changes
from evopatch.rewrite.quiet import quietly
from evopatch.rewrite.tracing import TraceSpec

from . import layer
from .families import function_of, loaded
from .interface import CORE_NAMES, CORES, TappedInterface
from .sam import SlowFastEncoder, image_size_of

_HOSTS = {("sam3.modeling_sam3", "Sam3ViTModel"): None}
_TABLES = "position_embeddings"


class Sam3Blocks(RotatedBlocks):
    """Its layers."""

    attention = "attention"
    norm = "layer_norm1"
    tables = _TABLES
    apart = ("rotary_emb",)
    traced = TappedInterface

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        # Unrotated: means over windows have no place to rotate by.
        asked, answering = (
            quietly(projection, x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for projection, x in ((attention.q_proj, query), (attention.k_proj, key))
        )
        logits: Tensor = asked * attention.scaling @ answering.transpose(2, 3)
        return logits.squeeze(2)


class Sam3Adapter(Adapter):
    """The encoder; what finds and draws the masks is as it was."""

    mixin = SlowFastEncoder

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return tuple(loaded(_HOSTS))

    def inspect(self, host: Any, name: str) -> HostSpec:
        rotation = function_of(host, "apply_rotary_pos_emb_2d")
        return HostSpec(
            blocks=(tuple((f"layers.{index}",) for index, _ in host.layers.named_children()),),
            prefix=0,
            readout=0,
            taper=0.0,
            windowed=True,
            trace=TraceSpec((_TABLES,), leaf_functions=(rotation,), core_names=CORE_NAMES, cores=CORES),
        )

    def plan(self, host: Any, state: HostState) -> list[Change]:
        changes = [Change(host, self.mixin, {"_evo_state": state}), *passages(host, state.index_of)]
        blocks = named_blocks(host, state)
        grid = self.grid(host, image_size_of(host.config))
        kind = Sam3Blocks(common_window((block for _, block in blocks), grid))
        for name, block in blocks:
            changes += window_block_changes(block, name, state, kind)
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        return layer.grid_of(host.config, image_size)
