"""Images for the tools: data sets in memory and settings to train on them, files, and where real ones are."""

import io
import os
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from variants import images

from evopatch import FinetuneConfig

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real weights and images beside the checkout; they may not be redistributed, so a plain clone has none."""

FAST = FinetuneConfig(epochs=6, batch_size=8, learning_rate=1e-3, warmup_epochs=0)
"""Settings of a fine-tuning run on `Images` that learns something in a second."""


def encoded(seed: int) -> bytes:
    """A JPEG of 48 by 40 random pixels."""
    pixels = torch.randint(0, 255, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "JPEG")
    return buffer.getvalue()


class Malicious:
    """Unpickled without care, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.mark,)


class Images(Dataset):
    """Random images of 7 classes whose brightness is their class.

    Args:
        kind: Of the items: `"tuple"`, `"mapping"`, or `"none"` for images without labels.
        count: How many.
        seed: Of the images; the labels go round.
    """

    def __init__(self, kind: str, count: int = 32, seed: int = 0) -> None:
        self.labels = torch.arange(count) % 7
        self.images = images(count, seed=seed) + self.labels[:, None, None, None] - 3
        self.kind = kind

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> object:
        image, label = self.images[index], self.labels[index]
        return {"tuple": (image, label), "mapping": {"pixel_values": image, "labels": label}, "none": image}[self.kind]


class NoisyImages(Dataset):
    """Random images of 7 classes, others every time they are read."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3, 40, 40), index % 7
