"""Gemma 4's vision tower in timm: flat, without prefix tokens, images of any aspect ratio filled up with masked
tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from evopatch.forward.walk import PatchedHost, walk
from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.rewrite.tracing import TraceSpec

_TABLES = ("rope_cos", "rope_sin")


class SlowFastGemma(PatchedHost):
    """Mixin of a patched encoder."""

    grad_checkpointing: bool

    def _encode(
        self,
        x: Tensor,
        position_ids: Tensor,
        padding_positions: Tensor | None,
        block_callback: Callable[[int, Tensor], None] | None = None,
        max_block_index: int | None = None,
    ) -> Any:
        """The host's own walk over its blocks."""
        # Who is called back, and a checkpointed block, sees the full grid.
        compact = block_callback is None and not self.grad_checkpointing
        args = x, position_ids, padding_positions, block_callback, max_block_index
        return walk(self, "_encode", *args, compact=compact)


class GemmaAdapter(Adapter):
    """The encoders; classifiers and projectors around them are served through these."""

    mixin = SlowFastGemma

    def hosts(self) -> tuple[type[nn.Module], ...]:
        module = sys.modules.get("timm.models.gemma4_vit")  # not in every version
        return () if module is None else (module.Gemma4VitEncoder,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        rotation: Callable[..., Any] = vars(sys.modules["timm.models.gemma4_vit"])["apply_multidimensional_rope"]
        return HostSpec(
            blocks="blocks",
            prefix=0,
            readout=0,
            trace=TraceSpec(_TABLES, leaf_functions=(rotation,)),
            token_inputs=_TABLES,
            tables_by_image=True,
            mask="attn_mask",
            pads=True,
        )

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = host.patch_size
        return image_size[0] // height, image_size[1] // width
