"""Speed of a frozen encoder on one large image, patched with the dense preset and unpatched in turn.

python benchmarks/large_image.py [--model vit_base_patch14_dinov2] [--size 518] [--rounds 9]
"""

from __future__ import annotations

import argparse

import timm
import torch

import evopatch
from evopatch import EvoConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch14_dinov2")
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    model = timm.create_model(asked.model, img_size=asked.size, num_classes=0).eval()
    evopatch.apply(model, config=EvoConfig.dense())
    image = torch.randn(1, 3, asked.size, asked.size)
    result = evopatch.benchmark(model, image, [EvoConfig.dense(), EvoConfig()], rounds=asked.rounds, warm_up=1)
    print(f"{asked.model} {asked.size} px, batch 1, {result.device}, {result.threads} threads, {result.dtype}, eager, "
          f"torch {result.torch}, timm {timm.__version__}")  # fmt: skip
    for side, name in zip(result.sides, ("unpatched", "EvoConfig.dense()", "default, keep 0.5"), strict=True):
        low, high = side.speed_up_spread
        print(f"{name}: {side.images_per_second:.3f} images/s, {side.flops:.3f} of the FLOPs, {side.speed_up:.3f} "
              f"times as fast (quartiles {low:.2f}-{high:.2f}), efficiency {side.efficiency:.3f}, "
              f"peak {side.memory / 2**20:.1f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
