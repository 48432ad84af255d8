"""`evopatch evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..progress import errors, progress_bar
from ..sources.preprocessing import Preprocessing
from . import options
from .class_numbers import number_as_model
from .options import Precision
from .patch_options import Asked, patch, several_configs
from .preprocessing_options import with_preprocessing
from .tables import counted, print_table, quality, quality_columns, table_of, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..sources.dataset import Images


@several_configs
@with_preprocessing
def evaluate(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            help="A .parquet or .arrow file with `image` and `label`, an ImageFolder directory, a data set's name on "
            "the Hugging Face hub, or digits."
        ),
    ],
    *,
    config: options.ConfigFile = None,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    asked: Asked,
    preprocessing: Preprocessing,
    rows: Annotated[str | None, typer.Option(help="Only these images, as in 650: or 0:100.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    workers: Annotated[int, typer.Option(min=0, help="Data-loading processes.")] = 0,
    device: options.Device = "cpu",
    dtype: Annotated[Precision, typer.Option()] = Precision.float32,
    json_out: options.JsonOut = None,
) -> None:
    """Top-1, top-5, agreement with and KL to the unpatched model, and FLOPs, without training.

    The model's own preprocessing is used unless overridden. Of models of something else than classes labels are left
    aside, and of a regression the mean squared difference is shown, relative to the variance between images.

        evopatch evaluate --model deit_tiny_patch16_224 --data val/ --keep-ratio 0.7 --keep-ratio 0.5
    """
    from torch.utils.data import DataLoader, Subset

    from ..measure.accuracy import evaluate as run
    from ..measure.comparison import ratio_text
    from ..measure.kinds import kind_of
    from ..sources.heads import count_classes
    from ..sources.images import open_evaluation
    from ..sources.models import open_classifier
    from ..training.items import Items, collate

    options.check_folder_of(json_out, "--json")
    classifier = open_classifier(model, checkpoint, num_classes, preprocessing)
    network = options.place(classifier.model, device, dtype)
    configs = patch(network, model, asked)
    images = open_evaluation(data, classifier.transform)
    dataset: Images | Subset[Any] = images
    if rows is not None:
        dataset = Subset(images, options.parse_rows(rows, len(images), "--rows"))
    items = Items(dataset)
    items.classes = count_classes(network) or None
    outputs = kind_of(network, count_classes(network))
    if images.labels is not None and outputs != "classes":
        images.labels = items.classes = None
        errors.print(f"{model} gives {outputs}, no classes: the labels are left aside", highlight=False, markup=False)
    if said := number_as_model(images, network, data, model):
        errors.print(said, highlight=False, markup=False, soft_wrap=True)
    loader = DataLoader(items, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    unreadable: list[str] = []

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in loader:
            unreadable.extend(batch.unreadable)
            yield batch.images, batch.labels

    with progress_bar(f"{model}, {len(configs)} setting(s)", len(dataset)) as advance:
        results = run(network, batches(), configs, classifier.input_size, on_batch=advance)
    if unreadable:
        errors.print(f"{len(unreadable)} unreadable image(s) left out: {', '.join(unreadable[:5])}", highlight=False)
    title = f"{model}, {counted(results[0].images, 'image', 'images')}, {dtype.value}, no training"
    table = table_of(title, ("representative",), ("keep\nratio", *quality_columns(results[0])))
    for result in results:
        kind = ("unpatched", "") if result is results[0] else (result.config.representative, ratio_text(result.config))
        table.add_row(*kind, *quality(result))
    print_table(table)
    write_json(json_out, [result.to_dict() for result in results])
