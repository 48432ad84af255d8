"""Small random Swin models, one per structure that the adapters serve."""

from collections.abc import Callable

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import nn
from torchvision.models import swin_transformer as torchvision_swin
from transformers import (
    DonutSwinConfig,
    DonutSwinModel,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Backbone,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2ForMaskedImageModeling,
    Swinv2Model,
)

SIZE = 64
"""Pixels; with patches of 4 grids of 16, 8 and 4 a side, and with windows of 4 16, 4 and 1 windows."""
DEPTH = 6
_SMALL = {"patch_size": 4, "window_size": 4, "embed_dim": 24, "drop_path_rate": 0.0}
_TIMM = _SMALL | {"img_size": SIZE, "depths": (2, 2, 2), "num_heads": (2, 4, 4), "num_classes": 7}
_HF = _SMALL | {"image_size": SIZE, "depths": [2, 2, 2], "num_heads": [2, 4, 4], "num_labels": 7, "encoder_stride": 16}


def _swin(cls: type[nn.Module], **fixed: object) -> Callable[..., nn.Module]:
    return lambda **k: cls(SwinConfig(**_HF | fixed | k))


def _swinv2(cls: type[nn.Module], **fixed: object) -> Callable[..., nn.Module]:
    return lambda **k: cls(Swinv2Config(**_HF | fixed | k))


TIMM: dict[str, Callable[..., nn.Module]] = {
    "swin": lambda **k: SwinTransformer(**_TIMM | k),
    "swinv2": lambda **k: SwinTransformerV2(**_TIMM | k),
    "swinv2_cr": lambda **k: SwinTransformerV2Cr(**_TIMM | {"extra_norm_period": 2, "extra_norm_stage": True} | k),
}


def _torchvision(**settings: object) -> nn.Module:
    named = {"patch_size": [4, 4], "window_size": [4, 4], "embed_dim": 24, "depths": [2, 2, 2], "num_classes": 7}
    rate = {"stochastic_depth_prob": settings.pop("drop_path_rate", 0.0)}
    return torchvision_swin.SwinTransformer(**named | {"num_heads": [2, 4, 4]} | rate | settings)


TORCHVISION: dict[str, Callable[..., nn.Module]] = {
    "torchvision_swin": _torchvision,
    "torchvision_swinv2": lambda **k: _torchvision(
        **{"block": torchvision_swin.SwinTransformerBlockV2, "downsample_layer": torchvision_swin.PatchMergingV2} | k
    ),
}
TRANSFORMERS: dict[str, Callable[..., nn.Module]] = {
    "hf_swin": _swin(SwinForImageClassification),
    "hf_swin_eager": _swin(SwinForImageClassification, attn_implementation="eager"),
    "hf_swin_model": _swin(SwinModel, use_absolute_embeddings=True),
    "hf_swin_masked": _swin(SwinForMaskedImageModeling),
    "hf_swin_backbone": _swin(SwinBackbone, out_features=["stage1", "stage2", "stage3"]),
    "hf_swinv2": _swinv2(Swinv2ForImageClassification),
    "hf_swinv2_model": _swinv2(Swinv2Model),
    "hf_swinv2_masked": _swinv2(Swinv2ForMaskedImageModeling),
    "hf_donut": lambda **k: DonutSwinModel(DonutSwinConfig(**_HF | k)),
    "hf_swinv2_backbone": _swinv2(Swinv2Backbone, out_features=["stage1", "stage2", "stage3"]),
}
