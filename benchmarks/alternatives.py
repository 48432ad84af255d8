"""What else makes a ViT cheaper without training, at the same FLOPs: ways to merge tokens, and a smaller image.

Compared with the unpatched model on whole images, by the shares of its FLOPs, top-1, agreement and KL:

    python benchmarks/alternatives.py --data ../shared/data --weights deit_tiny
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accuracy_curve import MODELS
from peers import mctf, pitome, token_merging
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import evopatch
from evopatch.cli.options import parse_rows
from evopatch.measure.profiling import count_flops
from evopatch.patching.handle import shared_copy
from evopatch.progress import progress_bar
from evopatch.sources.images import open_images
from evopatch.sources.models import Classifier, Preprocessing, open_classifier


class Side(NamedTuple):
    """One way to classify an image."""

    name: str
    model: nn.Module
    size: int
    """Pixels a side of the images that it takes."""
    flops: int


class Result(NamedTuple):
    """Means over images, against the first side: accuracies and agreement in percent, KL in nats."""

    top1: float
    agreement: float
    kl: float


@torch.no_grad()
def compare(sides: Sequence[Side], batches: Iterable[tuple[dict[int, Tensor], Tensor]]) -> list[Result]:
    """Run every side on the same images.

    Args:
        sides: The first is what the others are compared with.
        batches: Images `(B, 3, size, size)` by their size in pixels, and labels `(B,)`.
    """
    sums = torch.zeros(len(sides), 3, dtype=torch.float64)
    count = 0
    for images, labels in batches:
        whole: Tensor | None = None
        for row, side in zip(sums, sides, strict=True):
            logits = side.model(images[side.size])
            whole = logits if whole is None else whole
            kl = F.kl_div(logits.log_softmax(1), whole.log_softmax(1), reduction="sum", log_target=True)
            best = logits.argmax(1)
            row += torch.stack([(best == labels).sum(), (best == whole.argmax(1)).sum(), kl]).double()
        count += len(labels)
    return [Result(*(100 * row[:2] / count).tolist(), row[2].item() / count) for row in sums]


def side(name: str, model: nn.Module, size: int) -> Side:
    """A side with the FLOPs that a real forward needs."""
    image = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        flops, _ = count_flops(lambda: model(image))
    return Side(name, model, size, flops)


def sides_of(opened: Callable[[int | None], Classifier], ratios: Sequence[float], sizes: Sequence[int]) -> list[Side]:
    """Unpatched; at every keep ratio patched, the two token mergings with just more and no more FLOPs, PiToMe and MCTF
    with just no more; unpatched on smaller images."""
    whole = opened(None)
    own = whole.input_size[-1]
    sides = [side("unpatched", whole.model, own)]
    for ratio in ratios:
        patched = side(f"evopatch, keep_ratio={ratio:g}", evopatch.apply(shared_copy(whole.model), ratio), own)
        image = torch.zeros(1, *whole.input_size)
        merging = token_merging.at_flops(whole.model, image, patched.flops)
        milder = token_merging.TokenMerging(merging.model, merging.r - 1).eval()
        sides += [patched, *(side(f"token merging, r={m.r}", m, own) for m in (milder, merging))]
        protecting = pitome.at_flops(whole.model, image, patched.flops)
        sides.append(side(f"{pitome.NAME}, ratio={protecting.ratio:g}", protecting, own))
        fusing = mctf.at_flops(whole.model, image, patched.flops)
        sides.append(side(f"{mctf.NAME}, r={fusing.r}", fusing, own))
    return sides + [side(f"unpatched at {size} px", opened(size).model, size) for size in sizes]


class _Sized:
    """Each image in several sizes, with its label."""

    def __init__(self, images: Any, transforms: dict[int, Callable[[Any], Tensor]]) -> None:
        self._images, self._transforms = images, transforms

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[dict[int, Tensor], int]:
        image, label = self._images[index]
        return {size: transform(image) for size, transform in self._transforms.items()}, label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with weights and images")
    parser.add_argument("--weights", choices=sorted(MODELS), default="deit_tiny")
    parser.add_argument("--keep-ratio", type=float, action="append", help="repeat for several; default 0.7, 0.5, 0.4")
    parser.add_argument("--size", type=int, action="append", help="smaller images in pixels; default 192, 176, 160")
    parser.add_argument("--rows", default="650:", help="which images, as in 650: (the default) or 0:200")
    arguments = parser.parse_args()
    name, preprocessing = MODELS[arguments.weights]

    def opened(size: int | None) -> Classifier:
        options = Preprocessing(crop_pct=1.0, image_size=size, **preprocessing)
        return open_classifier(name, arguments.data / arguments.weights / "model.safetensors", preprocessing=options)

    sizes = arguments.size or [192, 176, 160]
    sides = sides_of(opened, arguments.keep_ratio or [0.7, 0.5, 0.4], sizes)
    transforms = {sides[0].size: opened(None).transform, **{size: opened(size).transform for size in sizes}}
    images = open_images(arguments.data / "imagenet_val_1300.parquet", lambda image: image)
    rows = parse_rows(arguments.rows, len(images))
    loader = DataLoader(Subset(_Sized(images, transforms), rows), batch_size=50)
    with progress_bar(f"{name}, {len(sides)} sides", len(rows)) as advance:

        def batches() -> Iterable[tuple[dict[int, Tensor], Tensor]]:
            for by_size, labels in loader:
                yield by_size, labels
                advance(len(labels))

        results = compare(sides, batches())
    table = Table(title=f"{name}, {len(rows)} images, float32, CPU, no training")
    for column in ("", "FLOPs", "top-1", "agree", "KL"):
        table.add_column(column)
    for own, result in zip(sides, results, strict=True):
        shares = f"{result.top1:.2f}", f"{result.agreement:.2f}", f"{result.kl:.4f}"
        table.add_row(own.name, f"{own.flops / sides[0].flops:.3f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
