"""Small random models, one per structure that the adapters serve."""

from collections.abc import Callable

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.levit import Levit, LevitDistilled
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn
from variants_transformers import PYRAMIDS as TRANSFORMERS_PYRAMIDS
from variants_transformers import VARIANTS as TRANSFORMERS_VARIANTS

SIZE = 40
"""Pixels; with patches of 8 a grid of 5 by 5."""
_SMALL = {"img_size": SIZE, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 6, "num_heads": 4}


class SubclassedViT(VisionTransformer):
    """What users do: a subclass that overrides a method and calls super()."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal) * 1.5


TIMM_VARIANTS: dict[str, Callable[..., nn.Module]] = {
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
    "diff_parallel": lambda **k: VisionTransformer(**_SMALL | {"block_fn": DiffParallelScalingBlock} | k),
    "subclass": lambda **k: SubclassedViT(**_SMALL | k),
    "relpos": lambda **k: VisionTransformerRelPos(**_SMALL | {"init_values": 0.5, "rel_pos_type": "mlp"} | k),
    "relpos_class": lambda **k: VisionTransformerRelPos(
        **_SMALL | {"class_token": True, "global_pool": "token", "init_values": 0.5, "rel_pos_type": "bias"} | k
    ),
    "relpos_shared": lambda **k: VisionTransformerRelPos(
        **_SMALL | {"init_values": 0.5, "shared_rel_pos": True, "block_fn": ResPostRelPosBlock} | k
    ),
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
    "eva_post_norm": lambda **k: Eva(**_SMALL | {"use_post_norm": True, "qkv_fused": False} | k),
}

_PYRAMID = {"img_size": SIZE, "num_classes": 7, "embed_dim": (32, 48, 64), "key_dim": 8, "depth": (2, 3, 2)}
_PYRAMID |= {"num_heads": (2, 3, 4), "stem_type": "s8"}  # grids of 5x5, 3x3 and 2x2

TIMM_PYRAMIDS: dict[str, Callable[..., nn.Module]] = {
    "levit": lambda **k: Levit(**_PYRAMID | k),
    "levit_conv": lambda **k: Levit(**_PYRAMID | {"use_conv": True} | k),
    "levit_distilled": lambda **k: LevitDistilled(**_PYRAMID | {"act_layer": "silu"} | k),
}

FLAT = TIMM_VARIANTS | TRANSFORMERS_VARIANTS
PYRAMIDS = TIMM_PYRAMIDS | TRANSFORMERS_PYRAMIDS
VARIANTS = FLAT | PYRAMIDS


def build(name: str, **kwargs: object) -> nn.Module:
    """A variant in eval mode, the same weights at every call; attention sharp enough to rank tokens by."""
    torch.manual_seed(0)
    model = VARIANTS[name](**kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
        if name in PYRAMIDS:
            calibrate(model, images_for(name, batch=64, size=kwargs.get("img_size"), seed=3))
    return model


def calibrate(model: nn.Module, x: torch.Tensor) -> None:
    """Batch norms as after training: the statistics of what they get, and branches as large as the residual."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.7, 1.3)
    model.train()(x)
    model.eval()
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.clamp_min_(0.1)  # or rounding would be magnified


def images(batch: int = 2, size: int | tuple[int, int] = SIZE, seed: int = 1) -> torch.Tensor:
    """Random images `(B, 3, size, size)`."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def images_for(name: str, batch: int = 2, size: int | tuple[int, int] | None = None, seed: int = 1) -> torch.Tensor:
    """Random images of a variant's own size."""
    own = 2 * SIZE if name in TRANSFORMERS_PYRAMIDS else SIZE
    return images(batch, own if size is None else size, seed)


def call(model: nn.Module, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """What a model is used for: logits, embeddings, feature maps or last hidden state."""
    out = model(x, **kwargs)
    if isinstance(out, torch.Tensor):
        return out
    for key in ("logits", "image_embeds", "reconstruction", "last_hidden_state"):
        if out.get(key) is not None:
            return out[key]
    return torch.cat(out.feature_maps, dim=1)


def between(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Tokens `(B, T, C)` after every block, as the library gives them to callers who ask."""
    if not hasattr(model, "forward_intermediates"):
        return list(model(x, output_hidden_states=True).hidden_states[1:])
    out = model.forward_intermediates(
        x, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=model.num_prefix_tokens > 0
    )
    return [torch.cat([o[1], o[0]], dim=1) for o in out] if model.num_prefix_tokens else out
