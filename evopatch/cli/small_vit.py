"""A small ViT, trained on real handwritten digits within a minute."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sources.dataset import Digits, Split

IMAGE_SIZE = 32
PATCH_SIZE = 4
BATCH = 32


def load(split: Split) -> tuple[Tensor, Tensor]:
    """The digits, enlarged: images `(B, 1, 32, 32)` in [0, 1], and labels `(B,)`."""
    from torchvision.transforms.functional import to_tensor

    digits = Digits(split)
    digits.transform = lambda image: to_tensor(image.convert("L"))
    images, labels = zip(*(digits[index] for index in range(len(digits))), strict=True)
    return F.interpolate(torch.stack(images), size=IMAGE_SIZE, mode="bilinear"), torch.tensor(labels)


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


def steps(data: tuple[Tensor, Tensor], epochs: int) -> int:
    """Of a training."""
    return epochs * -(-len(data[0]) // BATCH)


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, advance: Callable[[], None]) -> None:
    """Plain supervised training; `advance` is called after every step."""
    images, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    total = steps(data, epochs)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=total, pct_start=0.2)
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
