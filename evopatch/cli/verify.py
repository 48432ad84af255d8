"""`evopatch verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from ..progress import errors
from ..sources.preprocessing import Preprocessing
from . import options
from .options import Precision
from .patch_options import Asked, one_config, patch
from .preprocessing_options import with_preprocessing
from .tables import console, print_table, table_of, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn


@one_config
@with_preprocessing
def verify(
    model: options.Model,
    *,
    config: options.ConfigFile = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images, as for evaluate; the model has trained weights then. Default: random images and, of a name "
            "without --checkpoint, random weights, for which no network is needed."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights in timm's layout. Default: with --data timm's pretrained ones, else random ones."),
    ] = None,
    num_classes: options.NumClasses = None,
    asked: Asked,
    preprocessing: Preprocessing,
    batch_size: Annotated[int, typer.Option(min=2, help="So many images, evenly spread over the data.")] = 8,
    device: options.Device = "cpu",
    dtype: Annotated[Precision, typer.Option()] = Precision.float32,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Also whether the compiled model gives the same; takes a minute or more.")
    ] = False,
    json_out: options.JsonOut = None,
) -> None:
    """Whether a patched model keeps its promises on this device and in this type. Run it first on new hardware.

    Fails with exit code 1 if a check does.

        evopatch verify --model deit_small_patch16_224 --device cuda --dtype bfloat16 --compile

        evopatch verify --model deit_tiny_patch16_224 --data photos/
    """
    from ..measure.verification import verify as run

    options.check_folder_of(json_out, "--json")
    network, images = _open(model, data, checkpoint, num_classes, preprocessing, batch_size)
    network = options.place(network, device, dtype)
    patch(network, model, asked)
    found = run(network, images, compile=compile_)
    table = table_of(f"{model}, {'x'.join(map(str, images.shape))}", ("check", ""), ("found", "at most"))
    for check in found.checks:
        figures = ("-" if number is None else f"{number:.2g}" for number in (check.figure, check.bound))
        table.add_row(check.name, check.result, *figures)
    print_table(table)
    for check in found.checks:
        if check.note:
            console.print(f"{check.name}: {check.note}", highlight=False, markup=False)
    console.print(
        f"{found.device}, {found.dtype}, torch {found.torch}. Differences relative to the largest output; of finite "
        "results the number that aren't.",
        highlight=False,
    )
    write_json(json_out, found.to_dict())
    if not found.passed:
        failed = ", ".join(check.name for check in found.checks if check.result == "failed")
        errors.print(f"failed: {failed}", highlight=False)
        raise SystemExit(1)


def _open(
    model: str,
    data: str | None,
    checkpoint: Path | None,
    num_classes: int | None,
    preprocessing: Preprocessing,
    batch_size: int,
) -> tuple[nn.Module, Tensor]:
    """The unpatched model, and images for it."""
    import torch

    from ..sources.architectures import open_architecture
    from ..sources.encoders import open_encoder

    if data is None and checkpoint is None and not Path(model).is_dir():
        network, input_size = open_architecture(model, preprocessing.image_size)
        return network, _random(batch_size, input_size)
    encoder = open_encoder(model, checkpoint, num_classes, preprocessing)
    if data is None:
        return encoder.model, _random(batch_size, encoder.input_size)
    from ..sources.images import open_evaluation
    from ..training.items import Items

    dataset = open_evaluation(data, encoder.transform)
    dataset.labels = None
    items = Items(dataset)
    step = max(1, len(items) // batch_size)
    images: list[Tensor] = []
    unreadable: list[str] = []
    for index in range(0, len(items), step):
        item = items[index]
        unreadable += item.unreadable
        if item.image is not None:
            images.append(item.image)
        if len(images) == batch_size:
            break
    if unreadable:
        errors.print(f"{len(unreadable)} unreadable image(s) left out: {', '.join(unreadable[:5])}", highlight=False)
    if len(images) < 2:
        raise DataError(f"{data} has {len(images)} image(s) that can be read: expected at least 2")
    return encoder.model, torch.stack(images)


def _random(batch_size: int, input_size: tuple[int, int, int]) -> Tensor:
    import torch

    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))
