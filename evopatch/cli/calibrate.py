"""`evopatch calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import errors
from ..sources.preprocessing import Preprocessing
from . import options
from .options import Precision
from .patch_options import Asked, one_config, patch
from .preprocessing_options import with_preprocessing
from .tables import console, percent, print_table, table_of

if TYPE_CHECKING:
    from rich.table import Table

    from ..calibration.outcome import Calibration, Point

_TARGET = "Target: exactly one"


@one_config
@with_preprocessing
def calibrate(
    model: options.Model,
    data: Annotated[str, typer.Option(help="Images, as for finetune: the training part. Labels are ignored.")],
    *,
    config: options.ConfigFile = None,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    target_flops: Annotated[
        float | None, typer.Option(help="Share of the unpatched FLOPs.", rich_help_panel=_TARGET)
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Times as fast as unpatched, measured.", rich_help_panel=_TARGET)
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(
            help="Mean KL to unpatched, in nats; of a regression squared error / variance, of features 1 - cosine.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    target_agreement: Annotated[
        float | None, typer.Option(help="Share of images whose class stays.", rich_help_panel=_TARGET)
    ] = None,
    images: Annotated[int, typer.Option(min=8, help="At most so many of the data, evenly spread.")] = 128,
    rows: Annotated[str | None, typer.Option(help="Only of these images, as in :650.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the forwards, also of those that are timed.")] = 16,
    budget: Annotated[float, typer.Option(min=0.01, help="Minutes of search.")] = 5.0,
    output: Annotated[
        Path, typer.Option(help="Folder for the model, its card, table and picture, and what was tried.")
    ] = Path("evopatch-calibrated"),
    device: options.Device = "cpu",
    dtype: Annotated[Precision, typer.Option()] = Precision.float32,
    preprocessing: Preprocessing,
    asked: Asked,
) -> None:
    """The best settings for this model under a target, found on a few images without labels.

    Half of the images are searched on; the others decide what of it is kept, and are reported on. Ctrl-C keeps what was
    tried: the same command goes on.

        evopatch calibrate --model deit_tiny_patch16_224 --data photos/ --target-flops 0.65 --output tuned
    """
    import matplotlib  # noqa: F401, before the work that it draws

    from ..calibration.calibrating import SEARCH_FILE
    from ..calibration.calibrating import calibrate as run
    from ..calibration.target import Target
    from ..sources.images import open_images
    from ..sources.models import open_classifier
    from ..sources.saving import save_pretrained

    options.check_folder(output, "--output")
    Target.of(flops=target_flops, speedup=target_speedup, kl=target_kl, agreement=target_agreement)
    classifier = open_classifier(model, checkpoint, num_classes, preprocessing)
    network = options.place(classifier.model, device, dtype)
    dataset = open_images(data, classifier.transform)
    dataset.labels = None
    if dataset.part is not None:
        errors.print(f"{data}: its part '{dataset.part}'", highlight=False, markup=False, soft_wrap=True)
    chosen = range(len(dataset)) if rows is None else options.parse_rows(rows, len(dataset), "--rows")
    few = options.spread_rows(len(chosen), images)
    from torch.utils.data import Subset

    patch(network, model, asked)
    try:
        result = run(
            network,
            Subset(dataset, [chosen[place] for place in few]),
            target_flops=target_flops,
            target_speedup=target_speedup,
            target_kl=target_kl,
            target_agreement=target_agreement,
            batch_size=batch_size,
            budget=60 * budget,
            output=output,
        )
    except KeyboardInterrupt:
        kept = f"what was tried is kept in {output}, the same command goes on"
        if not (output / SEARCH_FILE).exists():
            kept = "nothing was tried yet"
        errors.print(f"interrupted: {kept}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(130) from None
    save_pretrained(network, output, classifier.processor)
    result.save(output)
    print_table(_table(model, result))
    console.print(_summary(result, output), highlight=False, markup=False, soft_wrap=True)


def _table(model: str, result: Calibration) -> Table:
    from ..measure.kinds import MEASURES

    loss = MEASURES[result.outputs].short
    table = table_of(f"{model}, {result.target}", ("", "runs"), ("keeping", "FLOPs", "speed\n-up", loss, "agree\n%"))
    for point in (result.before, result.after):
        table.add_row(point.name, *_settings(point), f"{point.flops:.3f}", f"{point.speed_up:.2f}", *_loss(point))
    return table


def _settings(point: Point) -> tuple[str, str]:
    firsts, ratios = point.config.stages, point.config.keep_ratio
    assert isinstance(firsts, tuple)
    assert isinstance(ratios, tuple)
    return " ".join(map(str, firsts)), " ".join(f"{ratio:.2f}" for ratio in ratios)


def _loss(point: Point) -> tuple[str, str]:
    return f"{point.error:.4f}", percent(None if point.agreement is None else 100 * point.agreement)


def _summary(result: Calibration, folder: Path) -> str:
    learned = ["foresight"] if result.foresight else []
    runs = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in result.corrected)
    learned += [f"corrections of blocks {runs}"] * bool(runs)
    reached = "Reached" if result.reached else "NOT reached; this is the best that was found"
    return (
        f"{reached}. {result.tried} settings on {result.searched} images in {result.seconds / 60:.1f} minutes, figures "
        f"on {result.reported} others; {result.device}, {result.dtype}, batch {result.batch_size}. Learned: "
        f"{' and '.join(learned) or 'nothing'}. Saved to {folder}: evopatch.load_pretrained('{folder}')"
    )
