"""Small random flat models and LeViT of transformers, one per structure that its adapters serve."""

from collections.abc import Callable

from torch import nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    EomtConfig,
    EomtForUniversalSegmentation,
    IJepaConfig,
    IJepaForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
    LevitModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    XCLIPVisionConfig,
    XCLIPVisionModel,
    YolosConfig,
    YolosModel,
)
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config
from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone

_SMALL = {
    "image_size": 40,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_labels": 7,
}
_DINO = {k: v for k, v in _SMALL.items() if k != "intermediate_size"} | {"layerscale_value": 0.5, "mlp_ratio": 2}


def _vit(cls: type[nn.Module], **fixed: object) -> Callable[..., nn.Module]:
    return lambda **k: cls(ViTConfig(**_SMALL | {"encoder_stride": 8} | fixed | k))


def _deit(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda **k: cls(DeiTConfig(**_SMALL | {"encoder_stride": 8} | k))


def _dinov2(cls: type[nn.Module], config: type = Dinov2Config, **fixed: object) -> Callable[..., nn.Module]:
    return lambda **k: cls(config(**_DINO | fixed | k))


def _eomt(num_hidden_layers: int = 6, **settings: object) -> nn.Module:
    """With two layers behind these that its queries join."""
    own = {"num_hidden_layers": num_hidden_layers + 2, "num_blocks": 2, "num_queries": 7, "num_upscale_blocks": 1}
    return EomtForUniversalSegmentation(EomtConfig(**_DINO | own | settings))


FLAT: dict[str, Callable[..., nn.Module]] = {
    "hf_vit": _vit(ViTForImageClassification),
    "hf_vit_eager": _vit(ViTForImageClassification, attn_implementation="eager"),
    "hf_vit_model": _vit(ViTModel),
    "hf_vit_masked": _vit(ViTForMaskedImageModeling),
    "hf_deit": _deit(DeiTForImageClassification),
    "hf_deit_teacher": _deit(DeiTForImageClassificationWithTeacher),
    "hf_deit_masked": _deit(DeiTForMaskedImageModeling),
    "hf_dinov2": _dinov2(Dinov2ForImageClassification),
    "hf_dinov2_swiglu": _dinov2(Dinov2Model, use_swiglu_ffn=True),
    "hf_dinov2_backbone": _dinov2(Dinov2Backbone, out_features=["stage2", "stage6"]),
    "hf_registers": _dinov2(Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig),
    "hf_registers_backbone": _dinov2(Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig, out_features=["stage6"]),
    "hf_dinov3": lambda **k: DINOv3ViTModel(
        DINOv3ViTConfig(**_SMALL | {"num_register_tokens": 3, "layerscale_value": 0.5} | k)
    ),
    "hf_msn": lambda **k: ViTMSNForImageClassification(ViTMSNConfig(**_SMALL | k)),
    "hf_ijepa": lambda **k: IJepaForImageClassification(IJepaConfig(**_SMALL | k)),
    "hf_clip": lambda **k: CLIPVisionModelWithProjection(CLIPVisionConfig(**_SMALL | {"projection_dim": 16} | k)),
    "hf_blip2": lambda **k: Blip2VisionModel(Blip2VisionConfig(**_SMALL | k)),
    "hf_blip": lambda **k: BlipVisionModel(BlipVisionConfig(**_SMALL | k)),
    "hf_aimv2": lambda **k: Aimv2VisionModel(Aimv2VisionConfig(**_SMALL | k)),
    "hf_yolos": lambda **k: YolosModel(
        YolosConfig(
            **_SMALL | {"image_size": [40, 40], "num_detection_tokens": 3, "use_mid_position_embeddings": False} | k
        )
    ),
    "hf_rf_detr_backbone": lambda **k: RfDetrDinov2Backbone(
        RfDetrDinov2Config(
            **_DINO
            | {
                "image_size": 80,
                "num_windows": 2,
                "window_block_indexes": [0, 1, 3, 4],
                "out_features": ["stage2", "stage6"],
            }
            | k
        )
    ),
    "hf_x_clip": lambda **k: XCLIPVisionModel(XCLIPVisionConfig(**_SMALL | {"num_frames": 1} | k)),
    "hf_eomt": _eomt,
    "hf_siglip": lambda **k: SiglipVisionModel(SiglipVisionConfig(**_SMALL | k)),
}

_LEVIT = {"image_size": 80, "num_labels": 7, "hidden_sizes": [32, 48, 64], "key_dim": [8] * 3, "depths": [2, 3, 2]}
_LEVIT |= {"num_attention_heads": [2, 3, 4]}  # grids of 5x5, 3x3 and 2x2


def _levit(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    def build(drop_path_rate: float = 0.0) -> nn.Module:
        model = cls(LevitConfig(**_LEVIT))
        for module in model.modules():
            if hasattr(module, "drop_rate"):
                module.drop_rate = drop_path_rate  # the configuration takes whole numbers only
        return model

    return build


PYRAMIDS: dict[str, Callable[..., nn.Module]] = {
    "hf_levit": _levit(LevitForImageClassification),
    "hf_levit_model": _levit(LevitModel),
    "hf_levit_teacher": _levit(LevitForImageClassificationWithTeacher),
}
