"""Vision towers of language models in timm, flat and without prefix tokens: DeepSeek's and Qwen 3's."""

from __future__ import annotations

import sys
from typing import Any

from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import nn

from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.rewrite.tracing import TraceSpec

from .walks import SlowFastFlat, grid_of

_CLASSES = {"deepseek_vit": "DeepseekVitEncoder", "qwen3_vit": "Qwen3VitEncoder"}
"""By timm's module; not in every version."""


class TowerAdapter(Adapter):
    """The encoders; classifiers and projectors around them are served through these."""

    mixin = SlowFastFlat

    def hosts(self) -> tuple[type[nn.Module], ...]:
        modules = {name: sys.modules.get(f"timm.models.{name}") for name in _CLASSES}
        return tuple(getattr(module, _CLASSES[name]) for name, module in modules.items() if module is not None)

    def inspect(self, host: Any, name: str) -> HostSpec:
        trace = TraceSpec(("rope",), leaf_functions=(apply_rot_embed_cat,))
        return HostSpec(blocks="blocks", prefix=0, readout=0, trace=trace, token_inputs=("rope",))

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        return grid_of(host, image_size)
