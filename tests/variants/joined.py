"""Small random encoders of which some blocks attend inside windows, and others over the whole map."""

from collections.abc import Callable

from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from transformers import Sam3ViTConfig, Sam3ViTModel, SamVisionConfig, SamVisionModel, VitDetConfig, VitDetModel

SIZE = 64
"""Pixels; with patches of 8 a grid of 8 by 8, and 4 windows of 4 by 4."""
_SMALL = {"patch_size": 8, "window_size": 4}
_TIMM = _SMALL | {"img_size": SIZE, "embed_dim": 48, "depth": 6, "num_heads": 4, "use_rel_pos": True}
_TIMM |= {"global_attn_indexes": (2, 5), "neck_chans": 24, "num_classes": 7}
_HF = _SMALL | {"image_size": SIZE, "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
SAM = _HF | {"global_attn_indexes": [2, 5], "mlp_dim": 96, "output_channels": 24}
"""Settings of transformers' SAM encoders."""
VITDET = _HF | {"pretrain_image_size": SIZE, "use_relative_position_embeddings": True, "mlp_ratio": 2}
VITDET |= {"window_block_indices": [0, 1, 3, 4], "residual_block_indices": [2, 5]}
"""Those of ViTDet."""
SAM3 = _HF | {"pretrain_image_size": SIZE // 2, "intermediate_size": 96, "global_attn_indexes": [2, 5]}
"""Those of SAM 3."""

TIMM: dict[str, Callable[..., nn.Module]] = {"sam": lambda **k: VisionTransformerSAM(**_TIMM | k)}
TRANSFORMERS: dict[str, Callable[..., nn.Module]] = {
    "hf_sam": lambda **k: SamVisionModel(SamVisionConfig(**SAM | k)),
    "hf_sam_eager": lambda **k: SamVisionModel(SamVisionConfig(**SAM | {"attn_implementation": "eager"} | k)),
    "hf_sam3": lambda **k: Sam3ViTModel(Sam3ViTConfig(**SAM3 | k)),
    "hf_vitdet": lambda **k: VitDetModel(VitDetConfig(**VITDET | k)),
}
