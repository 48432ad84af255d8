"""Patched and unpatched, in float32 and in int8, by runtime: accuracy on real images, and speed in turn.

Quantised by 128 images of the first 650, reported on the last 650; KL and agreement are to the unpatched model in eager
float32. `--rounds 0` leaves the speed out.

    python benchmarks/int8.py --data ../shared/data --weights deit_tiny
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accuracy_curve import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import evopatch
from evopatch.deployment.exporting import FORMS
from evopatch.measure.timing import alternate
from evopatch.progress import progress_bar
from evopatch.sources.images import open_images
from evopatch.sources.models import Preprocessing, open_classifier

FORMATS = ("onnx", "openvino", "pt2")
TUNED, CALIBRATION, VERIFIED = 650, 128, 16


class Side(NamedTuple):
    """One file: of one runtime, patched or not, in one type."""

    name: str
    run: Callable[[Tensor], tuple[Tensor, ...]]
    megabytes: float


def sides_of(
    model: torch.nn.Module, forms: Sequence[str], keep_ratio: float, images: Tensor, int8: Tensor, folder: Path
) -> list[Side]:
    """A patched model's files; at a keep ratio of 1 it is the unpatched one.

    Args:
        model: A patched classifier.
        forms: Formats that can be quantised.
        keep_ratio: Of the patched sides.
        images: `(M, 3, height, width)` to verify with.
        int8: `(M, 3, height, width)` to quantise by.
        folder: For the files.
    """
    sides = []
    for form in forms:
        for kind, calibration in (("float32", None), ("int8", int8)):
            for patched, ratio in (("unpatched", 1.0), ("patched", keep_ratio)):
                evopatch.set_keep_ratio(model, ratio)
                path = folder / f"{form}-{kind}-{patched}{FORMS[form].ending}"
                written = evopatch.export(model, path, form, images=images, int8=calibration)
                opened = FORMS[form].open
                assert opened is not None
                sides.append(Side(f"{form}, {kind}, {patched}", opened(path), written.size / 1e6))
    return sides


class Result(NamedTuple):
    """Means over images: accuracy and agreement in percent, KL in nats."""

    top1: float
    agreement: float
    kl: float


@torch.no_grad()
def compare(
    model: torch.nn.Module, sides: Sequence[Side], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, list[Result]]:
    """Top-1 of the model, and every side against it.

    Args:
        model: The unpatched model.
        sides: Files.
        batches: Images `(B, 3, height, width)` and labels `(B,)`.
    """
    sums, right, count = torch.zeros(len(sides), 3, dtype=torch.float64), 0, 0
    for images, labels in batches:
        whole = model(images)
        right += int((whole.argmax(1) == labels).sum())
        for row, side in zip(sums, sides, strict=True):
            logits = side.run(images)[0]
            kl = F.kl_div(logits.log_softmax(1), whole.log_softmax(1), reduction="sum", log_target=True)
            best = logits.argmax(1)
            row += torch.stack([(best == labels).sum(), (best == whole.argmax(1)).sum(), kl]).double()
        count += len(labels)
    return 100 * right / count, [Result(*(100 * row[:2] / count).tolist(), row[2].item() / count) for row in sums]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with weights and images")
    parser.add_argument("--weights", choices=sorted(MODELS), default="deit_tiny")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--format", choices=FORMATS, action="append", help="repeat for several; default all three")
    parser.add_argument("--images", type=int, default=650, help="how many of the last 650 to report on")
    parser.add_argument("--batch-size", type=int, default=16, help="of the timed batches")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    name, preprocessing = MODELS[arguments.weights]
    checkpoint = arguments.data / arguments.weights / "model.safetensors"
    classifier = open_classifier(name, checkpoint, preprocessing=Preprocessing(crop_pct=1.0, **preprocessing))
    images = open_images(arguments.data / "imagenet_val_1300.parquet", classifier.transform)

    def stacked(rows: Iterable[int]) -> Tensor:
        return torch.stack([images[row][0] for row in rows])

    model = evopatch.apply(classifier.model, arguments.keep_ratio)
    shown, calibration = stacked(range(VERIFIED)), stacked(range(VERIFIED, TUNED, (TUNED - VERIFIED) // CALIBRATION))
    forms = arguments.format or FORMATS
    with tempfile.TemporaryDirectory() as folder:
        sides = sides_of(model, forms, arguments.keep_ratio, shown, calibration[:CALIBRATION], Path(folder))
        evopatch.set_keep_ratio(model, 1.0)
        rows = range(TUNED, len(images))[: arguments.images]
        loader = DataLoader(Subset(images, rows), batch_size=50)
        with progress_bar(f"{name}, {len(sides)} files", len(rows)) as advance:

            def batches() -> Iterable[tuple[Tensor, Tensor]]:
                for batch, labels in loader:
                    yield batch, labels
                    advance(len(labels))

            top1, results = compare(model, sides, batches())
        timed = stacked(rows[: arguments.batch_size])
        calls = {side.name: partial(side.run, timed) for side in sides}
        seconds = alternate(calls, torch.device("cpu"), arguments.rounds, 3) if arguments.rounds else {}
    threads, half = torch.get_num_threads(), f"keep_ratio={arguments.keep_ratio:g}"
    table = Table(title=f"{name}, {half}, {len(rows)} images, CPU, {threads} threads, batch {arguments.batch_size}")
    for column in ("file", "MB", "top-1", "agree", "KL", "images/s", "speed-up"):
        table.add_column(column, no_wrap=True)
    table.add_row("eager, float32, unpatched", "", f"{top1:.2f}", "100.00", "0", "", "")
    for side, result in zip(sides, results, strict=True):
        speed = ("", "")
        if seconds:
            whole = seconds[f"{side.name.split(',')[0]}, float32, unpatched"]
            ratios = [slow / fast for slow, fast in zip(whole, seconds[side.name], strict=True)]
            per_second = arguments.batch_size / statistics.median(seconds[side.name])
            speed = f"{per_second:.1f}", f"{statistics.median(ratios):.2f}"
        quality = f"{result.top1:.2f}", f"{result.agreement:.2f}", f"{result.kl:.4f}"
        table.add_row(side.name, f"{side.megabytes:.1f}", *quality, *speed)
    Console().print(table)


if __name__ == "__main__":
    main()
