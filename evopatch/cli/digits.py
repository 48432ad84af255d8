"""`evopatch demo`: real handwritten digits, a small timm ViT, the three representatives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..config import EvoConfig, Representative
from ..measure.accuracy import evaluate
from ..measure.pictures import visualize
from ..measure.timing import compare_speed
from ..patching.apply import apply, set_config

IMAGE_SIZE = 32
PATCH_SIZE = 4
EPOCHS = 18
BATCH = 32
TIMED_BATCH = 128
KEEP_RATIOS = (0.7, 0.5, 0.3)
REPRESENTATIVES: tuple[Representative, ...] = ("matched", "single", "none")

ProgressBar = Callable[[str, int], AbstractContextManager[Any]]


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1797 digits, enlarged: train images and labels, test images and labels; pixels in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear")
    labels = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def create_model() -> nn.Module:
    """A ViT of 9 blocks on 64 patch tokens, 1 M parameters."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=IMAGE_SIZE, patch_size=PATCH_SIZE, in_chans=1, num_classes=10, embed_dim=96, depth=9, num_heads=3
    )
    return model


def normalise(images: Tensor) -> Tensor:
    """Pixels in [0, 1] to about zero mean and unit variance."""
    return (images - 0.3) / 0.35


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, advance: Callable[[], None]) -> None:
    """Plain supervised training; `advance` is called after every step."""
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(normalise(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            advance()
    model.eval()


def run(out: Path, console: Console, progress_bar: ProgressBar, epochs: int = EPOCHS) -> None:
    """Train, patch, compare; print a table and write a picture to `out`."""
    torch.manual_seed(0)
    train_images, train_labels, images, labels = load_digits()
    model = create_model()
    with progress_bar("training a small ViT on handwritten digits", epochs * -(-len(train_images) // BATCH)) as advance:
        train(model, train_images, train_labels, epochs, advance)
    apply(model)
    configs = [EvoConfig(keep_ratio=k, representative=r) for r in REPRESENTATIVES for k in KEEP_RATIOS]
    with progress_bar("evaluating", len(images)) as advance:
        inputs = normalise(images)
        batches = zip(inputs.split(BATCH), labels.split(BATCH), strict=True)
        results = evaluate(model, batches, configs, (1, IMAGE_SIZE, IMAGE_SIZE), on_batch=advance)
    table = Table(title=f"{len(images)} test digits; batch {TIMED_BATCH}, float32, CPU, no fine-tuning")
    table.add_column("representative", no_wrap=True)
    for column in ("keep\nratio", "top-1\n%", "blocks'\nFLOPs", "images/s\npatched", "images/s\nunpatched"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("speed-up", justify="right", no_wrap=True)
    table.add_row("(unpatched)", "", f"{results[0].top1:.1f}", "1.00", "", "", "")
    with progress_bar("timing", len(configs)) as advance:
        for result in results[1:]:
            set_config(model, result.config)
            speed = compare_speed(model, inputs[:TIMED_BATCH])
            table.add_row(
                result.config.representative,
                f"{result.config.keep_ratio:g}",
                f"{result.top1:.1f}",
                f"{result.blocks_flops:.2f}",
                f"{speed.patched:.0f}",
                f"{speed.unpatched:.0f}",
                f"{speed.ratio:.2f}x",
            )
            advance()
    console.print(table)
    set_config(model, EvoConfig())
    shown = slice(0, 6)
    figure = visualize(model, inputs[shown], blocks=(0, 3, 6), pixels=images[shown, 0])
    figure.suptitle("slow tokens at keep_ratio=0.5")
    figure.savefig(out)
    console.print(f"token selection: {out}", highlight=False, soft_wrap=True)
