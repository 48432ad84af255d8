"""Small random flat models, LeViT and PiT of timm, one per structure that its adapters serve."""

from collections.abc import Callable

from timm.models import vision_transformer
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.levit import Levit, LevitDistilled
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

SIZE = 40
"""Pixels; with patches of 8 a grid of 5 by 5."""
_SMALL = {"img_size": SIZE, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 6, "num_heads": 4}


class SubclassedViT(VisionTransformer):
    """What users do: a subclass that overrides a method and calls super()."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal) * 1.5


FLAT: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda **k: VisionTransformer(**_SMALL | k),
    "deit_distilled": lambda **k: VisionTransformerDistilled(**_SMALL | k),
    "registers": lambda **k: VisionTransformer(**_SMALL | {"reg_tokens": 3, "no_embed_class": True} | k),
    "dinov2": lambda **k: VisionTransformer(**_SMALL | {"init_values": 0.5} | k),
    "clip": lambda **k: VisionTransformer(**_SMALL | {"pre_norm": True, "norm_layer": nn.LayerNorm} | k),
    "qk_norm": lambda **k: VisionTransformer(**_SMALL | {"qk_norm": True, "scale_attn_norm": True} | k),
    "gap": lambda **k: VisionTransformer(**_SMALL | {"class_token": False, "global_pool": "avg"} | k),
    "reg_gap": lambda **k: VisionTransformer(
        **_SMALL | {"class_token": False, "reg_tokens": 4, "global_pool": "avg"} | k
    ),
    "siglip": lambda **k: VisionTransformer(**_SMALL | {"class_token": False, "global_pool": "map"} | k),
    "post_norm": lambda **k: VisionTransformer(**_SMALL | {"block_fn": ResPostBlock, "init_values": 0.5} | k),
    "parallel": lambda **k: VisionTransformer(**_SMALL | {"block_fn": ParallelScalingBlock} | k),
    "parallel_things": lambda **k: VisionTransformer(**_SMALL | {"block_fn": ParallelThingsBlock} | k),
    "diff": lambda **k: VisionTransformer(**_SMALL | {"attn_layer": "diff"} | k),
    "diff_parallel": lambda **k: VisionTransformer(
        **_SMALL | {"block_fn": vision_transformer.DiffParallelScalingBlock} | k
    ),
    "subclass": lambda **k: SubclassedViT(**_SMALL | k),
    "relpos": lambda **k: VisionTransformerRelPos(**_SMALL | {"init_values": 0.5, "rel_pos_type": "mlp"} | k),
    "relpos_class": lambda **k: VisionTransformerRelPos(
        **_SMALL | {"class_token": True, "global_pool": "token", "init_values": 0.5, "rel_pos_type": "bias"} | k
    ),
    "relpos_shared": lambda **k: VisionTransformerRelPos(
        **_SMALL | {"init_values": 0.5, "shared_rel_pos": True, "block_fn": ResPostRelPosBlock} | k
    ),
    "beit": lambda **k: Beit(**_SMALL | {"use_rel_pos_bias": True, "init_values": 0.5, "qkv_bias": True} | k),
    "beit_shared": lambda **k: Beit(**_SMALL | {"use_shared_rel_pos_bias": True, "global_pool": "token"} | k),
    "eva": lambda **k: Eva(**_SMALL | {"global_pool": "token"} | k),
    "rope": lambda **k: Eva(**_SMALL | {"use_rot_pos_emb": True, "attn_type": "rope", "init_values": 0.5} | k),
    "rope_mixed": lambda **k: Eva(
        **_SMALL | {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope", "global_pool": "token"} | k
    ),
    "rope_dinov3": lambda **k: Eva(
        **_SMALL
        | {
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "attn_type": "rope",
            "num_reg_tokens": 4,
            "rope_rotate_half": True,
            "swiglu_mlp": True,
            "global_pool": "token",
            "init_values": 0.5,
        }
        | k
    ),
    "cait": lambda **k: Cait(**_SMALL | {"init_values": 0.5} | k),
    "eva_post_norm": lambda **k: Eva(**_SMALL | {"use_post_norm": True, "qkv_fused": False} | k),
}

if not hasattr(vision_transformer, "DiffParallelScalingBlock"):  # before timm 1.0.23
    del FLAT["diff"], FLAT["diff_parallel"]

# Grids of 5x5, 3x3 and 2x2.
_PYRAMID = {"img_size": SIZE, "num_classes": 7, "depth": (2, 3, 2)}
_LEVIT = _PYRAMID | {"embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 3, 4), "stem_type": "s8"}
_PIT = _PYRAMID | {"patch_size": 12, "stride": 7, "base_dims": (12, 12, 12), "heads": (2, 4, 8)}

PYRAMIDS: dict[str, Callable[..., nn.Module]] = {
    "levit": lambda **k: Levit(**_LEVIT | k),
    "levit_conv": lambda **k: Levit(**_LEVIT | {"use_conv": True} | k),
    "levit_distilled": lambda **k: LevitDistilled(**_LEVIT | {"act_layer": "silu"} | k),
    "pit": lambda **k: PoolingVisionTransformer(**_PIT | k),
    "pit_distilled": lambda **k: PoolingVisionTransformer(**_PIT | {"distilled": True} | k),
}
