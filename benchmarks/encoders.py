"""Speed of encoders inside detectors and segmenters of transformers, patched and unpatched in turn.

Sizes are those of the checkpoints that people use; weights and images are random.

python benchmarks/encoders.py segformer yolos --batch-size 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import evopatch
from evopatch import EvoConfig


class Case(NamedTuple):
    """A model with random weights, and the size of its images."""

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        hidden_sizes=[64, 128, 320, 512], depths=[3, 4, 18, 3], decoder_hidden_size=768, num_labels=150
    )
    return transformers.SegformerForSemanticSegmentation(config)


def yolos() -> nn.Module:
    config = transformers.YolosConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=[512, 864]
    )
    return transformers.YolosForObjectDetection(config)


def eomt() -> nn.Module:
    config = transformers.EomtConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_blocks=3, image_size=640, num_queries=200
    )
    return transformers.EomtForUniversalSegmentation(config)


def lw_detr() -> nn.Module:
    return transformers.LwDetrForObjectDetection(transformers.LwDetrConfig(projector_scale_factors=[1.0]))


CASES = {
    "segformer": Case("SegFormer-B3", segformer, (512, 512)),
    "yolos": Case("YOLOS-S", yolos, (512, 864)),
    "eomt": Case("EoMT-B", eomt, (640, 640)),
    "rf-detr": Case("RF-DETR", lambda: transformers.RfDetrForObjectDetection(transformers.RfDetrConfig()), (560, 560)),
    "lw-detr": Case("LW-DETR", lw_detr, (640, 640)),
    "sam3": Case("SAM 3, image encoder", lambda: transformers.Sam3ViTModel(transformers.Sam3ViTConfig()), (1008, 1008)),
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join(CASES))] = None,
    batch_size: Annotated[list[int] | None, typer.Option()] = None,
    keep_ratio: float = 0.5,
    rounds: int = 5,
) -> None:
    """Print a table of models at batch sizes."""
    asked = names or list(CASES)
    if unknown := [name for name in asked if name not in CASES]:
        raise typer.BadParameter(f"{unknown}: expected some of {list(CASES)}")
    table = Table(title=f"transformers {transformers.__version__}, keep_ratio={keep_ratio}")
    for column in ("model", "batch", "FLOPs", "images/s, unpatched", "patched", "speed-up", "quartiles", "efficiency"):
        table.add_column(column)
    about = ""
    for name in track(asked, console=Console(stderr=True)):
        case = CASES[name]
        torch.manual_seed(0)
        model = evopatch.apply(case.build().eval(), keep_ratio)
        for batch in batch_size or [1]:
            images = torch.randn(batch, 3, *case.size)
            found = evopatch.benchmark(model, images, [EvoConfig(keep_ratio=keep_ratio)], rounds=rounds, warm_up=1)
            unpatched, patched = found.sides
            low, high = patched.speed_up_spread
            table.add_row(
                f"{case.name}, {case.size[0]}x{case.size[1]}",
                str(batch),
                f"{patched.flops:.3f}",
                f"{unpatched.images_per_second:.2f}",
                f"{patched.images_per_second:.2f}",
                f"{patched.speed_up:.3f}",
                f"{low:.2f}-{high:.2f}",
                f"{patched.efficiency:.3f}",
            )
            about = f"{found.device}, {found.threads} threads, {found.dtype}, {rounds} rounds, torch {found.torch}"
    console = Console(width=120)
    console.print(table)
    console.print(about)


if __name__ == "__main__":
    typer.run(main)
