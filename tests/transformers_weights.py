"""timm's ViT, DeiT and Swin weights under transformers' names, and a DeiT-Ti folder for its `from_pretrained`.

python tests/transformers_weights.py ../shared/data/deit_tiny/model.safetensors FOLDER
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

VIT_KEYS = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "blocks": "layers",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "norm": "layernorm",
}
DINOV2_KEYS = VIT_KEYS | {
    "reg_token": "embeddings.register_tokens",
    "blocks": "encoder.layer",
    "norm1": "norm1",
    "norm2": "norm2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def rename(weights: dict[str, torch.Tensor], keys: dict[str, str], prefix: str, heads: dict[str, str]):
    """A timm state dict under the names of a transformers model.

    Args:
        weights: timm's.
        keys: Parts of names, timm's to transformers'.
        prefix: Of the encoder, such as `vit.`.
        heads: Classifiers, timm's to transformers'.
    """
    renamed = {}
    for name, tensor in weights.items():
        module = name.split(".")[0]
        if module in heads:
            renamed[name.replace(module, heads[module], 1)] = tensor
            continue
        if ".attn.qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                new = name.replace("attn.qkv", f"attention.{part}_proj").replace("blocks", keys["blocks"])
                renamed[prefix + new] = third
            continue
        new = f".{name}."
        for old, replacement in keys.items():
            new = new.replace(f".{old}.", f".{replacement}.")
        renamed[prefix + new.strip(".")] = tensor
    return renamed


def swin(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A timm state dict of a Swin under the names of a SwinForImageClassification."""
    names = {"patch_embed.proj.": "embeddings.patch_embeddings.projection.", "patch_embed.norm.": "embeddings.norm."}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    table = "relative_position_bias_table"
    found = {}
    for name, value in weights.items():
        start = next((old for old in names if name.startswith(old)), None)
        if start is not None:
            found["swin." + name.replace(start, names[start])] = value
        elif name.startswith("norm."):
            found["swin.layernorm." + name[5:]] = value
        elif name.startswith("head.fc."):
            found["classifier." + name[8:]] = value
        elif ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            found[f"swin.encoder.layers.{int(stage) - 1}.{rest}"] = value
        elif ".qkv." in name:
            before, after = name.split("attn.qkv.")
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                found[f"swin.encoder.{before}attention.{part}.{after}"] = piece
        else:
            for old, new in (*inner.items(), (f"attn.{table}", f"attention.relative_position_bias.{table}")):
                name = name.replace(old, new)
            found["swin.encoder." + name] = value
    return found


def deit_tiny(file: Path) -> ViTForImageClassification:
    """DeiT-Ti without distillation is a ViT to transformers, on the hub as here."""
    config = ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, num_labels=1000
    )
    model = ViTForImageClassification(config).eval()
    model.load_state_dict(rename(load_file(file), VIT_KEYS, "vit.", {"head": "classifier"}))
    return model


def main(file: str, folder: str) -> None:
    """Write the model and the preprocessing of the validation images: bicubic to 224 pixels, no crop."""
    model = deit_tiny(Path(file))
    names = ImageNetInfo()
    model.config.id2label = {i: names.index_to_description(i).split(",")[0] for i in range(1000)}
    model.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
