"""ViT, DeiT, DINOv2 and the other flat vision transformers of transformers that share their layer's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.deit.modeling_deit import DeiTModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Encoder
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEncoder
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTEncoder, apply_rotary_pos_emb
from transformers.models.ijepa.modeling_ijepa import IJepaModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.vit.modeling_vit import ViTModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModel
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNModel

from evopatch.errors import UnsupportedInputError
from evopatch.forward.host_state import HostState
from evopatch.patching.adapter import Adapter, Change, HostSpec
from evopatch.rewrite.tracing import TraceSpec

from . import heads, layer
from .interface import CORE_NAMES, CORES


class _Family(NamedTuple):
    blocks: str
    prefix: Callable[[Any], int]
    """Number of prefix tokens by the model's config."""
    readout: int = 1
    rotary: bool = False


_FAMILIES: dict[type[nn.Module], _Family] = {
    ViTModel: _Family("layers", lambda config: 1),
    ViTMSNModel: _Family("layers", lambda config: 1),
    ViTMAEModel: _Family("layers", lambda config: 1),
    DeiTModel: _Family("layers", lambda config: 2, readout=2),
    IJepaModel: _Family("layers", lambda config: 0, readout=0),
    Dinov2Encoder: _Family("layer", lambda config: 1),
    Dinov2WithRegistersEncoder: _Family("layer", lambda config: 1 + config.num_register_tokens),
    DINOv3ViTEncoder: _Family("layer", lambda config: 1 + config.num_register_tokens, rotary=True),
    CLIPVisionModel: _Family("encoder.layers", lambda config: 1),
    SiglipVisionModel: _Family("encoder.layers", lambda config: 0, readout=0),
}


class ViTAdapter(Adapter):
    """The modules that loop over the layers; every head and every model that holds one is served through them."""

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return tuple(_FAMILIES)

    def inspect(self, host: Any, name: str) -> HostSpec:
        family = next(family for cls, family in _FAMILIES.items() if isinstance(host, cls))
        inputs = ("position_embeddings",) if family.rotary else ()
        trace = TraceSpec(
            inputs,
            absent=("attention_mask",),
            leaf_functions=(apply_rotary_pos_emb,),
            core_names=CORE_NAMES,
            cores=CORES,
        )
        return HostSpec(
            family.blocks,
            family.prefix(host.config),
            family.readout,
            head_reads=family.readout,
            trace=trace,
            token_inputs=inputs,
        )

    def plan_holder(self, holder: nn.Module, host: nn.Module) -> list[Change]:
        return heads.plan(holder, host)

    def plan(self, host: nn.Module, state: HostState) -> list[Change]:
        return layer.plan(host, state)

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        if isinstance(host, ViTMAEModel):
            raise UnsupportedInputError(
                "ViTMAEModel shuffles its patch tokens and leaves some out: they have no place on a grid here"
            )
        return layer.grid_of(host.config, image_size)
