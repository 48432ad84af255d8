"""PVT and PVT v2 of transformers, which aren't served."""

from __future__ import annotations

from torch import nn
from transformers.models.pvt.modeling_pvt import PvtEncoder
from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2Encoder

from evopatch.patching.refusing import ReducedKeysAdapter


class PvtAdapter(ReducedKeysAdapter):
    """Refuses the encoders that every PVT model and head of transformers holds."""

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (PvtEncoder, PvtV2Encoder)
