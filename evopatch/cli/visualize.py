"""`evopatch visualize`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError, ConfigError, UnreadableImageError
from ..sources.preprocessing import Preprocessing
from . import options
from .patch_options import Asked, one_config, patch
from .preprocessing_options import with_preprocessing
from .tables import console

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


@one_config
@with_preprocessing
def visualize(
    model: options.Model,
    *,
    image: Annotated[list[Path], typer.Option(help="A picture. Repeat for several.")],
    out: Annotated[Path, typer.Option(help="Where the picture goes; the ending names the format.")] = Path(
        "selection.png"
    ),
    config: options.ConfigFile = None,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            help="Show one block at several checkpoints of a training instead: the output folder of `evopatch "
            "finetune` (see --checkpoints-kept there), or a folder of weights in timm's layout."
        ),
    ] = None,
    block: Annotated[
        list[int] | None, typer.Option(help="Repeat for several. Default: the blocks that select anew.")
    ] = None,
    groups: Annotated[bool, typer.Option("--groups", help="Colour the tokens that are updated together.")] = False,
    asked: Asked,
    preprocessing: Preprocessing,
) -> None:
    """Which tokens are slow: rows are pictures, columns are blocks or checkpoints.

    evopatch visualize --model deit_small_patch16_224 --image cat.jpg --image dog.jpg --out slow.png

    evopatch visualize --model deit_tiny_patch16_224 --image cat.jpg --checkpoints run --out training.png
    """
    import timm
    import torch

    from ..measure.pictures import visualize as run
    from ..measure.pictures import visualize_training
    from ..sources.models import open_classifier

    options.check_picture(out, "--out")
    if checkpoints is not None and (groups or len(block or ()) > 1):
        raise ConfigError("--checkpoints shows the slow tokens of one block: leave --groups out, and give one --block")
    states = None if checkpoints is None else _states(checkpoints)
    # Weights given by --checkpoints take the place of timm's; a transformers model's come with its configuration.
    pretrained = states is None or not timm.is_model(model)
    classifier = open_classifier(model, checkpoint, num_classes, preprocessing, pretrained)
    patch(classifier.model, model, asked)
    batch = torch.stack([classifier.transform(_open(path)) for path in image])
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (classifier.mean, classifier.std))
    pixels = (batch * scale + shift).clamp(0, 1).permute(0, 2, 3, 1)
    if states is None:
        figure = run(classifier.model, batch, blocks=block, groups=groups, pixels=pixels)
    else:
        figure = visualize_training(
            classifier.model, batch, states, block=None if block is None else block[0], pixels=pixels
        )
    figure.savefig(out)
    console.print(f"{'groups of tokens' if groups else 'token selection'}: {out}", highlight=False, soft_wrap=True)


def _open(path: Path) -> Image:
    import PIL.Image

    from ..sources.pixels import as_rgb

    try:
        return as_rgb(PIL.Image.open(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableImageError(str(path), error) from error


def _states(folder: Path) -> dict[str, dict[str, Tensor]]:
    from ..sources.weight_files import read_state
    from ..training import checkpoints

    if own := checkpoints.weights(folder):
        # As trained: the model beside the heads that only training needs.
        return {f"step {step}": _of_model(read_state(file)) for step, file in own.items()}
    files = sorted((path for path in folder.glob("*") if path.suffix in _WEIGHTS), key=_natural)
    if not files:
        raise CheckpointError(
            f"{folder}: no checkpoints there; expected the output folder of `evopatch finetune`, or one with weights "
            f"({', '.join(_WEIGHTS)})"
        )
    return {file.stem: read_state(file) for file in files}


def _of_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
