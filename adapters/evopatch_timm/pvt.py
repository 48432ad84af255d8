"""timm PVT v2, which isn't served."""

from __future__ import annotations

from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import nn

from evopatch.patching.refusing import ReducedKeysAdapter


class PvtAdapter(ReducedKeysAdapter):
    """Refuses PVT v2."""

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (PyramidVisionTransformerV2,)
