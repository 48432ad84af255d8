"""Does patching cost more on images that aren't clean? Noise, blur and JPEG, against unpatched and token merging.

The images are corrupted after resizing and cropping and before normalisation, the same for every side and in every run.
Patched by default settings; token merging at the mildest with no more FLOPs. Agreement and KL are with the unpatched
model on the same corrupted image:

    python benchmarks/robustness.py --data ../shared/data --weights deit_tiny
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from accuracy_curve import MODELS
from alternatives import Side, compare, side
from peers import token_merging
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import Compose, Normalize, v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import evopatch
from evopatch.cli.options import parse_rows
from evopatch.patching.handle import shared_copy
from evopatch.progress import progress_bar
from evopatch.sources.images import open_images
from evopatch.sources.models import Classifier, Preprocessing, open_classifier


class Corruption(NamedTuple):
    """One way and strength to spoil an image."""

    name: str
    """With the strength."""
    apply: Callable[[Tensor], Tensor]
    """`(3, height, width)`, values from 0 to 1, to the same."""


def _jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    def apply(image: Tensor) -> Tensor:
        buffer = io.BytesIO()
        to_pil_image((255 * image).round().byte()).save(buffer, "JPEG", quality=quality)
        return pil_to_tensor(PIL.Image.open(buffer)).float() / 255

    return apply


CORRUPTIONS = (
    Corruption("clean", lambda image: image),
    *(Corruption(f"noise {sigma}", v2.GaussianNoise(sigma=sigma)) for sigma in (0.08, 0.18)),
    *(Corruption(f"blur {sigma} px", v2.GaussianBlur(6 * sigma + 1, sigma=sigma)) for sigma in (1, 3)),
    *(Corruption(f"JPEG quality {quality}", _jpeg(quality)) for quality in (25, 10)),
)
"""Of two strengths of a kind the weaker one first; noise and blur by their sigma."""


def corrupt(image: Tensor, corruption: Corruption, index: int) -> Tensor:
    """
    Args:
        image: `(3, height, width)`, values from 0 to 1.
        corruption: What to do to it.
        index: Of the image; seeds what is random.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        return corruption.apply(image)


class Corrupted:
    """Images `(3, height, width)`, normalised, with their labels.

    Args:
        images: Pairs of an image with values from 0 to 1 and its label.
        corruption: What happens to all of them.
        normalise: What comes after it.
    """

    def __init__(self, images: Any, corruption: Corruption, normalise: Callable[[Tensor], Tensor]) -> None:
        self._images, self._corruption, self._normalise = images, corruption, normalise

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index]
        return self._normalise(corrupt(image, self._corruption, index)), label


def sides_of(classifier: Classifier) -> list[Side]:
    """Unpatched, patched, token merging."""
    size = classifier.input_size[-1]
    patched = side("evopatch", evopatch.apply(shared_copy(classifier.model)), size)
    merging = token_merging.at_flops(classifier.model, torch.zeros(1, *classifier.input_size), patched.flops)
    return [side("unpatched", classifier.model, size), patched, side(f"token merging, r={merging.r}", merging, size)]


def table_rows(
    sides: Sequence[Side], batches: Callable[[Corruption], Iterable[tuple[Tensor, Tensor]]]
) -> list[tuple[str, ...]]:
    """One row for every corruption.

    Args:
        sides: Unpatched, patched, and the one to compare with.
        batches: Gives the images `(B, 3, size, size)` so corrupted, normalised, with labels `(B,)`.
    """
    rows = []
    for corruption in CORRUPTIONS:
        by_size = (({sides[0].size: images}, labels) for images, labels in batches(corruption))
        whole, patched, other = compare(sides, by_size)
        shares = whole.top1, patched.top1, patched.agreement
        numbers = (f"{patched.kl:.4f}", f"{other.top1:.2f}", f"{other.kl:.4f}")
        rows.append((corruption.name, *(f"{share:.2f}" for share in shares), *numbers))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with weights and images")
    parser.add_argument("--weights", choices=sorted(MODELS), default="deit_tiny")
    parser.add_argument("--rows", default="650:", help="which images, as in 650: (the default) or 0:200")
    arguments = parser.parse_args()
    name, preprocessing = MODELS[arguments.weights]
    options = Preprocessing(crop_pct=1.0, **preprocessing)
    classifier = open_classifier(name, arguments.data / arguments.weights / "model.safetensors", preprocessing=options)
    *until_tensor, normalise = classifier.transform.transforms
    assert isinstance(normalise, Normalize)
    images = open_images(arguments.data / "imagenet_val_1300.parquet", Compose(until_tensor))
    rows = parse_rows(arguments.rows, len(images))
    sides = sides_of(classifier)
    with progress_bar(f"{name}, {len(CORRUPTIONS)} corruptions", len(rows) * len(CORRUPTIONS)) as advance:

        def batches(corruption: Corruption) -> Iterable[tuple[Tensor, Tensor]]:
            for batch, labels in DataLoader(Subset(Corrupted(images, corruption, normalise), rows), batch_size=50):
                yield batch, labels
                advance(len(labels))

        found = table_rows(sides, batches)
    flops = ", ".join(f"{own.name} {own.flops / sides[0].flops:.3f}" for own in sides[1:])
    table = Table(title=f"{name}, {len(rows)} images, float32, CPU, no training\nFLOPs: {flops}")
    for column in ("", "top-1\nunpatched", "top-1\npatched", "agree", "KL", "top-1\nmerging", "KL\nmerging"):
        table.add_column(column)
    for row in found:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
