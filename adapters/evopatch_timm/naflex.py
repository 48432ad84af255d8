"""timm's NaFlexVit: images of any size and aspect ratio in one batch, smaller ones filled up with masked tokens."""

from __future__ import annotations

import sys
from typing import Any

from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import nn

from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.rewrite.tracing import TraceSpec

from .walks import SlowFastFlat, grid_of


class NaFlexAdapter(Adapter):
    """`naflexvit_*`, and `vit_*` created with `use_naflex=True`."""

    mixin = SlowFastFlat

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
        return grid_of(host, image_size)
