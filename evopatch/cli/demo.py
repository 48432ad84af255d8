"""`evopatch demo`: real handwritten digits, a small timm ViT, the three representatives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from ..config import EvoConfig, Representative
from ..progress import progress_bar
from . import options
from .tables import console, print_table, table_of

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

EPOCHS = 18
TIMED_BATCH = 128
KEEP_RATIOS = (0.7, 0.5, 0.3)


def demo(
    out: Annotated[Path, typer.Option(help="Where the picture of the token selection goes.")] = Path(
        "evopatch-demo.png"
    ),
    config: options.ConfigFile = None,
) -> None:
    """Train a small ViT on scikit-learn's handwritten digits, patch it, compare. No network, a few minutes.

    evopatch demo
    """
    options.check_picture(out, "--out")
    run(out)


def run(out: Path, epochs: int = EPOCHS) -> None:
    """Train, patch, compare; print a table and write a picture to `out`."""
    import torch

    from ..measure.pictures import visualize
    from ..patching.apply import apply, set_config
    from . import small_vit

    torch.manual_seed(0)
    data, (images, labels) = small_vit.load("train"), small_vit.load("eval")
    model = small_vit.create_model()
    with progress_bar("training a small ViT on handwritten digits", small_vit.steps(data, epochs)) as advance:
        small_vit.train(model, data, epochs, advance)
    apply(model)
    inputs = small_vit.normalise(images)
    print_table(_compared(model, inputs, labels))
    set_config(model, EvoConfig())
    shown = slice(0, 6)
    figure = visualize(model, inputs[shown], blocks=(0, 3, 6), pixels=images[shown, 0])
    figure.suptitle("slow tokens at keep_ratio=0.5")
    figure.savefig(out)
    console.print(f"token selection: {out}", highlight=False, soft_wrap=True)


def _compared(model: nn.Module, inputs: Tensor, labels: Tensor) -> Table:
    """A table: accuracy, FLOPs and speed of every representative at every keep ratio."""
    from ..measure.accuracy import evaluate
    from ..measure.timing import compare_speed
    from ..patching.apply import set_config
    from .small_vit import BATCH, IMAGE_SIZE

    configs = [EvoConfig(keep_ratio=k, representative=r) for r in get_args(Representative) for k in KEEP_RATIOS]
    with progress_bar("evaluating", len(inputs)) as advance:
        batches = zip(inputs.split(BATCH), labels.split(BATCH), strict=True)
        results = evaluate(model, batches, configs, (1, IMAGE_SIZE, IMAGE_SIZE), on_batch=advance)
    title = f"{len(inputs)} test digits; batch {TIMED_BATCH}, float32, CPU, no fine-tuning"
    columns = ("keep\nratio", "top-1\n%", "blocks'\nFLOPs", "images/s\npatched", "images/s\nunpatched", "speed-up")
    table = table_of(title, ("representative",), columns)
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
    return table
