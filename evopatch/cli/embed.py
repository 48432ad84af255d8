"""`evopatch embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import errors
from ..sources.preprocessing import Preprocessing
from . import options
from .options import Precision
from .patch_options import Asked, one_config, patch
from .preprocessing_options import with_preprocessing
from .tables import console, counted


@one_config
@with_preprocessing
def embed(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            help="A folder: every image under it, at any depth. Of other sources, as for finetune, the training part."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .parquet file; shards go to a folder beside it until it is done.")],
    *,
    config: options.ConfigFile = None,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    patch_features: Annotated[bool, typer.Option("--patch-features", help="Also of every patch token.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    shard_rows: Annotated[int, typer.Option(min=1, help="Images of one shard: lost at most when it is killed.")] = 1024,
    workers: Annotated[int, typer.Option(min=0, help="Data-loading processes.")] = 0,
    dtype: Annotated[Precision, typer.Option()] = Precision.float32,
    asked: Asked,
    preprocessing: Preprocessing,
) -> None:
    """Features of every image into one parquet file: of the image, and with --patch-features of its patches.

    Killed or interrupted, the same command goes on. Several GPUs or machines: accelerate launch -m evopatch embed ...

        evopatch embed --model deit_small_patch16_224 --data photos/ --out features.parquet
    """
    from ..embedding.writing import check_ending, process_state
    from ..embedding.writing import embed as run
    from ..sources.encoders import open_encoder
    from ..sources.images import open_every
    from ..training import processes

    options.check_folder_of(out, "--out")
    check_ending(out)
    encoder = open_encoder(model, checkpoint, num_classes, preprocessing)
    network = options.place(encoder.model, str(process_state().device), dtype)
    patch(network, model, asked)
    images = open_every(data, encoder.transform)
    settings = {"model": model, "preprocessing": _described(encoder.transform, preprocessing)}
    try:
        found = run(
            network, images, out, patch_features=patch_features, batch_size=batch_size, shard_rows=shard_rows,
            workers=workers, settings=settings,
        )  # fmt: skip
    except KeyboardInterrupt:
        text = f"interrupted: finished shards are kept in {out}.shards, the same command goes on"
        errors.print(text, highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(130) from None
    if found is not None:
        text = f"{counted(found.rows, 'image', 'images')} in {out}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        if found.unreadable:
            some = ", ".join(found.unreadable[:5]) + (", ..." if len(found.unreadable) > 5 else "")
            text = f"{len(found.unreadable)} unreadable image(s) left out, all named in the file's metadata: {some}"
            errors.print(text, highlight=False, soft_wrap=True, markup=False)
    processes.end()


def _described(transform: object, preprocessing: Preprocessing) -> str:
    # A function of transformers' processor says nothing of itself; the processor comes with the model.
    own = (
        "the model's own"
        if callable(transform) and hasattr(transform, "__name__")
        else " ".join(repr(transform).split())
    )
    changed = {name: value for name, value in preprocessing._asdict().items() if value is not None}
    return f"{own}, {changed}" if changed else own
