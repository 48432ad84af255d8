"""The images of a calibration, from what users have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..progress import errors
from ..training.items import Items, parts, refuse_unreadable

LEAST = 8


def images_of(data: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """
    Args:
        data: `(B, 3, height, width)`; a data set as for `evopatch.finetune`; or an iterable of batches, such as a
            loader: tensors, `(images, labels)`, or mappings with `pixel_values`. Labels are ignored.
        device: Where they are to be.
        dtype: Of what type.

    Returns:
        `(B, 3, height, width)`.

    Raises:
        DataError: If they are fewer than 8, of different sizes, or nothing of that kind, or more than 1 % of a data set
            can't be read.
    """
    found = [data] if isinstance(data, Tensor) else list(_tensors(data))
    sizes = sorted({tuple(images.shape[1:]) for images in found})
    if len(sizes) > 1 or (sizes and len(sizes[0]) != 3):
        raise DataError(f"images are of the sizes {sizes}: expected one (3, height, width), as the model takes them")
    images = torch.cat(found) if found else torch.empty(0)
    if len(images) < LEAST:
        raise DataError(f"{len(images)} image(s): expected at least {LEAST}, better 100: half of them are searched on")
    if not images.is_floating_point():
        raise DataError(f"images are {images.dtype}: expected floating-point numbers, normalised for the model")
    return images.to(device, dtype)


def repeated(images: Tensor, number: int) -> Tensor:
    """The first images, so many; fewer again and again."""
    times = -(-number // len(images))
    return (images.repeat(times, 1, 1, 1) if times > 1 else images)[:number]


def _tensors(data: Any) -> Iterator[Tensor]:
    # A loader has a length, too, but no items by position.
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        items = Items(data, labelled=False)
        found = [items[index] for index in range(len(items))]
        unreadable = [name for item in found for name in item.unreadable]
        refuse_unreadable(unreadable, len(items), "calibration")
        if unreadable:
            errors.print(f"{len(unreadable)} unreadable image(s) left out: {', '.join(unreadable)}", highlight=False)
        yield from (item.image.unsqueeze(0) for item in found if item.image is not None)
        return
    if not isinstance(data, Iterable):
        raise DataError(f"images are {type(data).__name__}: expected a tensor, a data set, or a loader of batches")
    for batch in data:
        images = getattr(batch, "images", None)  # of `training.items.Batch`
        yield images if isinstance(images, Tensor) else _batch(batch)


def _batch(batch: Any) -> Tensor:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    image, _ = parts(batch)
    if image.dim() != 4:
        raise DataError(f"a batch has the shape {tuple(image.shape)}: expected (B, 3, height, width)")
    return image
