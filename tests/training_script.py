"""A fine-tuning run as a process of its own, to be killed, resumed and distributed. Writes the final weights."""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from torch.utils.data import Dataset

import evopatch
from evopatch import EvoConfig, FinetuneConfig


class Noisy(Dataset):
    """Random images of 7 classes, another noise on them every time they are read."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        time.sleep(0.002)
        label = index % 7
        image = torch.full((3, 32, 32), label - 3.0) + torch.randn(3, 32, 32)
        return image, label


def build():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=6,
        num_heads=2,
        num_classes=7,
        drop_path_rate=0.2,
        proj_drop_rate=0.1,
    )
    # Such as the mask token of transformers' DINOv2: distributed training has to do without its gradient.
    model.register_parameter("mask_token", torch.nn.Parameter(torch.zeros(32)))
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--no-dropout", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("always")
    model = build()
    if arguments.no_dropout:
        for module in model.modules():
            if type(module).__name__ in ("DropPath", "Dropout"):
                module.p = module.drop_prob = 0.0
    evopatch.apply(model, config=EvoConfig.paper(0.5))
    result = evopatch.finetune(
        model,
        Noisy(),
        config=FinetuneConfig(**arguments.config),
        output=arguments.output,
        resume=arguments.output is not None,
        progress=False,
    )
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save({"weights": model.state_dict(), "losses": result.losses, "processes": processes}, arguments.weights)


if __name__ == "__main__":
    main()
