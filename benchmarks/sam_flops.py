"""FLOPs of timm's SAM encoders at their own size, patched against unpatched; without weights or images, on no device.

python benchmarks/sam_flops.py --model samvit_base_patch16
"""

from __future__ import annotations

from typing import Annotated

import timm
import torch
import typer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import evopatch
from evopatch import EvoConfig

SETTINGS = {
    "keep_ratio=0.7": EvoConfig(keep_ratio=0.7),
    "keep_ratio=0.5": EvoConfig(),
    "keep_ratio=0.5, start=1": EvoConfig(start=1),
    "keep_ratio=0.3": EvoConfig(keep_ratio=0.3),
}


def flops(model: nn.Module, size: int) -> dict[str, int]:
    """Of one forward on one image, by module; `"Global"` is all of it."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def main(model: Annotated[str, typer.Option()] = "samvit_base_patch16") -> None:
    """Print the share of the unpatched model's FLOPs, and those of two blocks."""
    net = timm.create_model(model, device="meta").eval()
    size = net.pretrained_cfg["input_size"][-1]
    windowed, joined = (
        [i for i, block in enumerate(net.blocks) if bool(block.window_size) == inside][-1] for inside in (True, False)
    )
    names = [f"{type(net).__name__}.blocks.{index}" for index in (windowed, joined)]
    whole = flops(net, size)
    evopatch.apply(net)
    for text, config in SETTINGS.items():
        evopatch.set_config(net, config)
        found = flops(net, size)
        inside, over = (found[name] / whole[name] for name in names)
        print(
            f"{text}: {found['Global'] / whole['Global']:.3f} of {whole['Global'] / 1e9:.0f} GFLOPs; "
            f"of a block with windows {inside:.3f}, of one over the map {over:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
