"""Small random pyramids whose keys and values are made of the whole map by convolutions."""

from collections.abc import Callable

from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import nn
from transformers import (
    PvtConfig,
    PvtForImageClassification,
    PvtV2Backbone,
    PvtV2Config,
    PvtV2ForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

_TIMM = {"depths": (2, 2, 2), "embed_dims": (16, 24, 32), "num_heads": (2, 4, 4), "sr_ratios": (4, 2, 1)}
_TIMM |= {"mlp_ratios": (2, 2, 2), "num_classes": 7}
_HF = {"depths": [2, 2, 2], "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 4, 4], "sr_ratios": [4, 2, 1]}
_HF |= {"mlp_ratios": [2, 2, 2], "patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "num_encoder_blocks": 3}
_HF |= {"num_labels": 7, "drop_path_rate": 0.0, "decoder_hidden_size": 16}
_PVT = _HF | {"image_size": 64, "num_encoder_blocks": 4, "depths": [2, 2, 2, 1], "patch_sizes": [4, 2, 2, 2]}
_PVT |= {"strides": [4, 2, 2, 2], "hidden_sizes": [16, 24, 32, 40], "num_attention_heads": [2, 4, 4, 4]}
_PVT |= {"sequence_reduction_ratios": [4, 2, 1, 1], "mlp_ratios": [2, 2, 2, 2]}


def _pvt(**settings: object) -> nn.Module:
    settings.pop("img_size", None)  # it takes any
    return PyramidVisionTransformerV2(**_TIMM | settings)


def _hf_pvt(cls: type[nn.Module], **fixed: object) -> Callable[..., nn.Module]:
    return lambda **k: cls(PvtV2Config(**_HF | fixed | k))


def _segformer(cls: type[nn.Module], **fixed: object) -> Callable[..., nn.Module]:
    return lambda **k: cls(SegformerConfig(**_HF | fixed | k))


TIMM: dict[str, Callable[..., nn.Module]] = {"pvt_v2": _pvt, "pvt_v2_linear": lambda **k: _pvt(linear=True, **k)}
TRANSFORMERS: dict[str, Callable[..., nn.Module]] = {
    "hf_pvt": lambda **k: PvtForImageClassification(PvtConfig(**_PVT | k)),
    "hf_pvt_v2": _hf_pvt(PvtV2ForImageClassification),
    "hf_pvt_v2_backbone": _hf_pvt(PvtV2Backbone, linear_attention=True, out_features=["stage1", "stage2", "stage3"]),
    "hf_segformer": _segformer(SegformerForImageClassification),
    "hf_segformer_eager": _segformer(SegformerForImageClassification, attn_implementation="eager"),
    "hf_segformer_dense": _segformer(SegformerForSemanticSegmentation),
}
