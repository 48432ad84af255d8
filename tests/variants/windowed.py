"""Small random Swin models, one per structure that the adapters serve."""

from collections.abc import Callable

import torch
import variants
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import nn
from transformers import (
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


TIMM_VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "swin": lambda **k: SwinTransformer(**_TIMM | k),
    "swinv2": lambda **k: SwinTransformerV2(**_TIMM | k),
    "swinv2_cr": lambda **k: SwinTransformerV2Cr(**_TIMM | {"extra_norm_period": 2, "extra_norm_stage": True} | k),
}
TRANSFORMERS_VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "hf_swin": _swin(SwinForImageClassification),
    "hf_swin_eager": _swin(SwinForImageClassification, attn_implementation="eager"),
    "hf_swin_model": _swin(SwinModel, use_absolute_embeddings=True),
    "hf_swin_masked": _swin(SwinForMaskedImageModeling),
    "hf_swin_backbone": _swin(SwinBackbone, out_features=["stage1", "stage2", "stage3"]),
    "hf_swinv2": _swinv2(Swinv2ForImageClassification),
    "hf_swinv2_model": _swinv2(Swinv2Model),
    "hf_swinv2_masked": _swinv2(Swinv2ForMaskedImageModeling),
    "hf_swinv2_backbone": _swinv2(Swinv2Backbone, out_features=["stage1", "stage2", "stage3"]),
}
VARIANTS = TIMM_VARIANTS | TRANSFORMERS_VARIANTS


def build(name: str, **kwargs: object) -> nn.Module:
    """A variant in eval mode, the same weights at every call."""
    torch.manual_seed(0)
    model = VARIANTS[name](**kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def images(batch: int = 2, size: int | tuple[int, int] = SIZE, seed: int = 1) -> torch.Tensor:
    """Random images of these variants' own size."""
    return variants.images(batch, size, seed)


def call(model: nn.Module, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """What a model is used for: logits, a reconstruction, the last feature map or hidden state."""
    out = model(x, **kwargs)
    if isinstance(out, torch.Tensor):
        return out
    for key in ("logits", "reconstruction", "last_hidden_state"):
        if out.get(key) is not None:
            return out[key]
    return out.feature_maps[-1]


def between(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Feature maps `(B, C, h, w)` after every stage, as the library gives them to callers who ask."""
    if hasattr(model, "forward_intermediates"):
        return model.forward_intermediates(x, intermediates_only=True)
    out = model(x, output_hidden_states=True)
    return list(out.feature_maps if "feature_maps" in out else out.reshaped_hidden_states[1:])
