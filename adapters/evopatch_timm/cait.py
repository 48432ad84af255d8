"""timm's CaiT: flat blocks of patch tokens alone, with talking heads; the class token comes behind them."""

from __future__ import annotations

from typing import Any

from timm.models.cait import Cait
from torch import nn

from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.rewrite.tracing import TraceSpec

from .walks import SlowFastFlat, grid_of


class CaitAdapter(Adapter):
    """Its blocks; the two that only the class token goes through attend to all tokens, as they were."""

    mixin = SlowFastFlat

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (Cait,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        return HostSpec(blocks="blocks", prefix=0, readout=0, later=1, trace=TraceSpec(mixing=("proj_l", "proj_w")))

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        return grid_of(host, image_size)
