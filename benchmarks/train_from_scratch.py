"""A small DeiT trained on CIFAR-10 from scratch: patched with the layer-to-stage schedule, against unpatched.

Both runs have the same weights to begin with, the same batches, augmentation and number of epochs; "unpatched" is
`keep_ratio=1`, at which every block runs the host's own forward. Run it alone on the machine, for the times to mean
something:

    python benchmarks/train_from_scratch.py --data ../shared/data/cifar10_train.parquet \
        --eval-data ../shared/data/cifar10_test.parquet
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Subset
from torchvision import transforms

import evopatch
from evopatch import EvoConfig, FinetuneConfig, FinetuneResult
from evopatch.sources.images import open_images

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
EVALUATION = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
AUGMENTATION = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]


def build(seed: int, dim: int, depth: int) -> VisionTransformer:
    """DeiT's blocks on the 8x8 grid of a 32 px image."""
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=32, patch_size=4, num_classes=10, embed_dim=dim, depth=depth, num_heads=dim // 64, weight_init="jax"
    )


def train(arguments: argparse.Namespace, keep_ratio: float, seed: int) -> FinetuneResult:
    """One run.

    Args:
        arguments: The command's.
        keep_ratio: 1 for unpatched.
        seed: Of weights, batches and augmentation.
    """
    train_data = open_images(arguments.data, transforms.Compose(AUGMENTATION + EVALUATION))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(train_data), generator=generator)[: arguments.images].tolist()
    model = build(seed, arguments.dim, arguments.depth)
    config = EvoConfig.paper() if arguments.representative == "single" else EvoConfig()
    evopatch.apply(model, keep_ratio, config)
    return evopatch.finetune(
        model,
        Subset(train_data, rows),
        open_images(arguments.eval_data, transforms.Compose(EVALUATION)),
        FinetuneConfig(
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            weight_decay=0.05,
            warmup_epochs=2,
            label_smoothing=0.1,
            layer_to_stage=keep_ratio < 1,
            mixed_precision=arguments.mixed_precision,
            seed=seed,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's training images, as a parquet file")
    parser.add_argument("--eval-data", type=Path, required=True, help="its test images")
    parser.add_argument("--images", type=int, default=16000, help="how many training images, drawn at random")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=9)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--representative", choices=("single", "matched"), default="single", help="single: the paper's")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--only-patched", action="store_true", help="leave the unpatched run out")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated (default: 0)")
    parser.add_argument("--json-out", type=Path, help="write the results there")
    arguments = parser.parse_args()
    precision = "float32" if arguments.mixed_precision == "no" else arguments.mixed_precision
    table = Table(
        title=f"{arguments.images} images, {arguments.epochs} epochs, batch {arguments.batch_size}, {precision}"
    )
    for column in ("seed", "model", "top-1 %", "training min", "images/s", "time"):
        table.add_column(column)
    results = []
    for seed in arguments.seed or [0]:
        ratios = [arguments.keep_ratio] if arguments.only_patched else [1.0, arguments.keep_ratio]
        runs = [train(arguments, keep_ratio, seed) for keep_ratio in ratios]
        for keep_ratio, run in zip(ratios, runs, strict=True):
            name = "unpatched" if keep_ratio == 1 else f"{arguments.representative}, keep {keep_ratio:g}"
            assert run.after is not None
            assert run.after.top1 is not None
            table.add_row(
                str(seed),
                name,
                f"{run.after.top1:.2f}",
                f"{run.seconds / 60:.1f}",
                f"{run.images_per_second:.0f}",
                "" if run is runs[0] else f"{run.seconds / runs[0].seconds - 1:+.1%}",
            )
            results.append({"seed": seed, "name": name, **run.to_dict()})
        Console().print(table)
        if arguments.json_out is not None:
            arguments.json_out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
