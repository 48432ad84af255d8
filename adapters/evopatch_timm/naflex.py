"""timm's NaFlexVit: images of any size and aspect ratio in one batch, smaller ones filled up with masked tokens."""

from __future__ import annotations

import sys
from typing import Any

from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from evopatch.forward.walk import PatchedHost, walk
from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.rewrite.tracing import TraceSpec


class SlowFastNaFlex(PatchedHost):
    """Mixin of a patched NaFlexVit: the two methods that walk over the blocks."""

    grad_checkpointing: bool
    embeds: Any

    def forward_features(self, patches: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        # A checkpointed block may depend on its arguments only, so it takes and returns the full grid.
        compact, grid = not self.grad_checkpointing, self._grid_of(patches)
        return walk(self, "forward_features", patches, *args, compact=compact, grid=grid, **kwargs)

    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; intermediate features are the full grid at every block."""
        return walk(self, "forward_intermediates", x, *args, compact=False, grid=self._grid_of(x), **kwargs)

    def _grid_of(self, x: Any) -> tuple[int, int] | None:
        if not isinstance(x, Tensor) or x.dim() != 4:
            return None  # patches, as many for every image
        rows, columns = self.embeds.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return rows, columns


class NaFlexAdapter(Adapter):
    """`naflexvit_*`, and `vit_*` created with `use_naflex=True`."""

    mixin = SlowFastNaFlex

    def hosts(self) -> tuple[type[nn.Module], ...]:
        module = sys.modules.get("timm.models.naflexvit")  # since timm 1.0.16
        return () if module is None else (module.NaFlexVit,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        inputs = () if getattr(host, "rope", None) is None else ("rope",)
        return HostSpec(
            blocks="blocks",
            prefix=host.num_prefix_tokens,
            readout=1 if host.global_pool == "token" else 0,
            trace=TraceSpec(inputs, leaf_functions=(apply_rot_embed_cat,)),
            token_inputs=inputs,
            mask="attn_mask",
            pads=True,
        )

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = host.embeds.dynamic_feat_size(image_size)
        return height, width
