"""`evopatch export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, DataError
from ..progress import errors
from ..sources.preprocessing import Preprocessing
from . import options
from .patch_options import Asked, one_config, patch
from .tables import console, counted, megabytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..deployment.exporting import Export
    from ..sources.models import Classifier

_ANY = "dynamic"
_INSTEAD = ", or --no-pretrained for random weights"
_CALIBRATION = 128
"""Images to quantise by, at most; after those that the file is verified with."""


class FormatName(str, Enum):
    """A file format for deployment."""

    onnx = "onnx"
    openvino = "openvino"
    executorch = "executorch"
    pt2 = "pt2"
    torchscript = "torchscript"
    coreml = "coreml"


@one_config
def export(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The file: .onnx, .xml, .pte, .pt2, .pt or .mlpackage.")],
    *,
    config: options.ConfigFile = None,
    format: Annotated[FormatName, typer.Option("--format")] = FormatName.onnx,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    pretrained: Annotated[bool, typer.Option("--pretrained/--no-pretrained", help="Or random weights.")] = True,
    asked: Asked,
    batch: Annotated[str | None, typer.Option(help="dynamic or a number. Default: dynamic if the format can.")] = None,
    image_size: Annotated[str | None, typer.Option(help="dynamic or pixels. Default: the model's.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Values in float16.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise by images of --data, of its training part where it has parts.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Images to verify with, as for evaluate. Default: noise.")] = None,
    images: Annotated[int, typer.Option(min=2, help="How many to verify with.")] = 16,
    benchmark: Annotated[bool, typer.Option("--benchmark", help="Time it against the unpatched model's file.")] = False,
) -> None:
    """A file for another runtime, run there and compared with the model image by image; a wrong one is removed.

    evopatch export --model deit_tiny_patch16_224 --format onnx --out deit.onnx --data val/ --benchmark
    """
    from ..deployment.exporting import FORMS
    from ..deployment.exporting import export as run
    from ..sources.encoders import open_encoder

    form = FORMS[format.value]
    any_size, size = image_size == _ANY, None if image_size in (None, _ANY) else _number(image_size, "--image-size")
    batch_size = (
        (None if form.any_batch else 1) if batch is None else None if batch == _ANY else _number(batch, "--batch")
    )
    form.check(batch_size is None, any_size, int8, half)
    options.check_folder_of(out, "--out", is_folder=format is FormatName.coreml)
    form.check_target(out)
    by_images = int8 and form.quantised_by_images
    if by_images and data is None:
        raise ConfigError("--int8: expected --data too, images to find the ranges of values by")
    preprocessing = Preprocessing(None, None, None, size)
    classifier = open_encoder(model, checkpoint, num_classes, preprocessing, pretrained, any_size, _INSTEAD)
    number = max(images, batch_size or 0)
    shown, calibration = _images(classifier, data, number, _CALIBRATION if by_images else 0)
    patch(classifier.model, model, asked)
    result = run(
        classifier.model, out, format.value, images=shown, batch_size=batch_size, any_size=any_size, half=half,
        int8=calibration if by_images else int8, benchmark=benchmark,
    )  # fmt: skip
    console.print(_summary(result, half or int8, form.run_with), highlight=False, soft_wrap=True)


def _number(text: str | None, option: str) -> int:
    if text is None or not text.isdecimal() or not int(text):
        raise ConfigError(f"{option} {text}: expected {_ANY}, or a number")
    return int(text)


def _images(classifier: Classifier, data: str | None, number: int, calibration: int) -> tuple[Tensor, Tensor]:
    """To verify with, and to quantise by: evenly spread over the data, none of them both."""
    import torch

    from ..sources.images import open_evaluation, open_images

    if data is None:
        noise = torch.randn(number, *classifier.input_size, generator=torch.Generator().manual_seed(0))
        return noise, noise[:0]
    dataset = open_evaluation(data, classifier.transform)
    training = open_images(data, classifier.transform) if calibration else dataset
    dataset.labels = training.labels = None
    # Ranges taken from images that accuracy is measured on later would flatter the file.
    apart = training.part != dataset.part
    calibration_here = 0 if apart else calibration
    if len(dataset) < number + min(calibration_here, 1):
        more = " and others to quantise by" if calibration_here else ""
        found = counted(len(dataset), "image", "images")
        raise DataError(f"{data} has {found}: expected {number} to verify with{more}")
    rows = options.spread_rows(len(dataset), number + calibration_here)
    # Neighbours may be of one class, so both kinds are spread.
    every = len(rows) / number
    verified = {rows[int(place * every)] for place in range(number)}
    quantised_by = [row for row in rows if row not in verified]
    if apart:
        quantised_by = options.spread_rows(len(training), calibration)
        text = f"{data}: quantised by its part '{training.part}', verified with '{dataset.part}'"
        errors.print(text, highlight=False, markup=False, soft_wrap=True)
    shown = [dataset[row][0] for row in sorted(verified)]
    others = [training[row][0] for row in quantised_by]
    return torch.stack(shown), torch.stack(others) if others else torch.zeros(0)


def _summary(result: Export, rounded: bool, run_with: str | None) -> str:
    lines = [f"{', '.join(map(str, result.files))}: {megabytes(result.size):.1f} MB."]
    checked = result.verification
    if checked is None:
        lines.append("Not verified: its runtime isn't to be had here.")
    else:
        sizes = ", ".join(f"{batch} of {height}x{width}" for batch, height, width in dict.fromkeys(checked.sizes))
        share = f"{checked.equal} of {checked.images} images equal to 1e-4"
        # Rounded values are never that equal, however good the file is.
        lines.append(f"Run by its own runtime in batches of {sizes}{'' if rounded else f': {share}'}.")
        if checked.turned:
            lines.append(
                f"{checked.turned} where two nearly equal tokens turned: the model gives the same when the image is "
                f"moved by less than rounding; they differ by up to {checked.difference:.0f} times the tolerance."
            )
        if run_with is not None:
            lines.append(f"That is with {run_with}; run it with the same, or expect less precision.")
        lines.append(f"Error: {checked.error:.2g} of the spread between images.")
    if result.speed is not None:
        speed = result.speed
        lines.append(
            f"{speed.patched:.1f} images/s, unpatched {speed.unpatched:.1f}: {speed.ratio:.2f} times as fast, in turn."
        )
    return "\n".join(lines)
