"""Features of every image of a data set, by any number of processes, and again after being killed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError, DataError
from ..patching.handle import Patched
from ..progress import errors, progress_bar
from ..sources.dataset import Images
from ..training import processes
from ..training.items import Batch, Items, collate
from ..version import VERSION
from .features import FeatureExtractor, Features
from .identity import digest_of_images, digest_of_settings, digest_of_transform, digest_of_weights
from .shards import Shards

WAIT = timedelta(days=7)
"""So long processes that are done wait for others; torch's default is minutes."""


@dataclass(frozen=True)
class Embedding:
    """A finished file of features."""

    output: Path
    rows: int
    unreadable: tuple[str, ...]
    """Names of the images that it has no rows of."""


def embed(
    model: nn.Module,
    images: Images,
    output: str | os.PathLike[str],
    *,
    patch_features: bool = False,
    batch_size: int = 32,
    shard_rows: int = 1024,
    workers: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Embedding | None:
    """Write the features of every image to a parquet file, one row each, in the order of the images.

    Its columns are `image` (the name), `features` and maybe `patch_features`, lists of fixed lengths `C` and `N` times
    `C`; float16 of models in float16, else float32. What a feature is says
    `evopatch.embedding.features.FeatureExtractor`. Images that can't be read have no row; the file's metadata name
    them, under `evopatch`, beside the settings.

    Several processes share the work where accelerate or torchrun started them; on several machines the file has to be
    in a folder that all of them see. Rows go to shards in a folder beside the file first. A run that was killed goes on
    with those that are missing when it is called again, with any number of processes; the file is the same.

    Args:
        model: A patched model of timm or transformers, on this process's device; it stays as it is, a copy on its
            weights is run in eval mode.
        images: As of `evopatch.sources.images`, with the model's preprocessing as their `transform`.
        output: The parquet file.
        patch_features: Also those of the patch tokens.
        batch_size: Images of one forward. A shard's last batch may be smaller.
        shard_rows: Images of one shard: what is lost at most when a process is killed, and is kept in memory.
        workers: Data-loading processes.
        settings: What else the features depend on, plain values, such as the preprocessing; recorded, and a run with
            others isn't gone on with.

    Returns:
        None in all processes but the main one.

    Raises:
        ConfigError: If there are shards that were made with other weights, settings or images, or by another version of
            evopatch, or the file is there, or named as if it were of another format.
        DataError: If `images` are something else, a shard is damaged, or no image can be read.
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If the model has no features that are known, or other tokens than those of the image's
            patches.
        UnsupportedInputError: If its patch tokens aren't a grid of one image.
    """
    for name, value in (("batch_size", batch_size), ("shard_rows", shard_rows)):
        if value < 1:
            raise ConfigError(f"{name}={value}: expected at least 1")
    if not isinstance(images, Images):
        raise DataError(
            f"images are a {type(images).__name__}: expected images with names, as of "
            "evopatch.sources.images.open_every(folder, transform); of a tensor "
            "evopatch.embedding.features.FeatureExtractor(model, patches=False)(tensor) gives the features"
        )
    file = Path(output)
    check_ending(file)
    extract = FeatureExtractor(model, patch_features)
    shards = Shards(file, len(images), shard_rows)
    state = process_state()
    if state.is_main_process:
        resumed = shards.begin(
            {
                **(settings or {}),
                "evopatch": VERSION,
                "configs": {name: config.to_dict() for name, config in Patched(model).configs.items()},
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "weights": digest_of_weights(model),
                "computes": digest_of_settings(model),
                "images": digest_of_images(images),
                "transform": digest_of_transform(images.transform),
                "patch_features": patch_features,
                "batch_size": batch_size,
                "shard_rows": shard_rows,
            }
        )
        if resumed and not shards.finished():
            there = sum(shards.there(shard) for shard in range(shards.number))
            _say(f"{there} of {shards.number} shards are there already, in {shards.folder}")
    state.wait_for_everyone()
    # By their numbers alone: which shards are there may change while another process looks.
    own = [] if shards.finished() else range(state.process_index, shards.number, state.num_processes)
    missing = [shard for shard in own if not shards.there(shard)]
    _make(extract, images, shards, missing, batch_size, workers, state)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    unreadable = shards.merge()
    return Embedding(file, len(images) - len(unreadable), tuple(unreadable))


def check_ending(file: Path) -> None:
    """
    Raises:
        ConfigError: If a file for features isn't named as the parquet that it will be.
    """
    if file.suffix != ".parquet":
        raise ConfigError(f"{file}: features are written as parquet, expected the ending .parquet")


def process_state() -> PartialState:
    """What accelerate knows of this process and the others; its `device` is where the model belongs."""
    return PartialState(cpu=processes.on_cpu(), timeout=WAIT)


def _make(
    extract: FeatureExtractor,
    images: Images,
    shards: Shards,
    missing: list[int],
    batch_size: int,
    workers: int,
    state: PartialState,
) -> None:
    like = next(extract.model.parameters())
    stored = torch.float16 if like.dtype == torch.float16 else torch.float32
    # Batches never reach over the end of a shard, so that nothing depends on who makes which.
    batches = {shard: list(_batches(shards.images_of(shard), batch_size)) for shard in missing}
    sampler = [list(part) for parts in batches.values() for part in parts]
    loader = DataLoader(_Placed(images), batch_sampler=sampler, num_workers=workers, collate_fn=_collate)
    made: Iterator[_PlacedBatch] = iter(loader) if sampler else iter(())
    total = sum(len(shards.images_of(shard)) for shard in missing)
    text = "images" if state.num_processes == 1 else f"images of process 1 of {state.num_processes}"
    with progress_bar(text, total, disable=not state.is_main_process) as advance:
        for shard, parts in batches.items():
            found: list[Features] = []
            names: list[str] = []
            unreadable: list[str] = []
            for part in parts:
                places, batch = next(made)
                unreadable += batch.unreadable
                names += [images.name(place) for place in places]
                if places:
                    image, patches = extract(batch.images.to(like.device, like.dtype))
                    found.append(
                        Features(image.to("cpu", stored), None if patches is None else patches.to("cpu", stored))
                    )
                advance(len(part))
            # Without any image nobody knows how long features are: any length will do.
            whole = torch.cat([features.image for features in found] or [torch.empty(0, 1, dtype=stored)])
            parts_of = [features.patches for features in found if features.patches is not None]
            whole_patches = torch.cat(parts_of or [torch.empty(0, 1, 1, dtype=stored)]) if extract.patches else None
            shards.write(shard, names, whole, whole_patches, unreadable)


def _batches(places: range, size: int) -> Iterator[range]:
    for first in range(0, len(places), size):
        yield places[first : first + size]


class _PlacedBatch(NamedTuple):
    places: list[int]
    """Of the images that could be read, in the data set."""
    batch: Batch


class _Placed(Dataset[Any]):
    def __init__(self, images: Images) -> None:
        self._items = Items(images, labelled=False)

    def __getitem__(self, index: int) -> Any:
        return index, self._items[index]


def _collate(placed: list[Any]) -> _PlacedBatch:
    return _PlacedBatch(
        [place for place, item in placed if item.image is not None], collate([item for _, item in placed])
    )


def _say(text: str) -> None:
    errors.print(text, highlight=False, soft_wrap=True)
