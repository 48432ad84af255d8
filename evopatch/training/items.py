"""What a data set's items are, and how they become batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, UnreadableImageError
from .randomness import seed_everything

UNREADABLE_LIMIT = 0.01
"""Share of the images of a data set; more unreadable ones than this are an error."""


class Item(NamedTuple):
    """One image, its label if it has one, and the names of unreadable images that it stands in for."""

    image: Tensor | None
    """`(3, height, width)`; None where an unreadable image isn't replaced."""
    label: int | None
    unreadable: tuple[str, ...]


class Batch(NamedTuple):
    """Items of one forward."""

    images: Tensor
    """`(B, 3, height, width)`."""
    labels: Tensor | None
    """`(B,)`."""
    unreadable: tuple[str, ...]


class Items(Dataset[Item]):
    """A user's data set, read one way.

    With a seed, item `i` of epoch `e` is read under random numbers that depend on the seed, `e` and `i` only: not on
    the number of data-loading or training processes, and not on where a run was resumed.

    Args:
        data: Items are `(image, label)`, mappings with `pixel_values` and maybe `labels` (as for transformers'
            Trainer), or images alone: `(3, height, width)`, normalised as the model expects.
        seed: Of the augmentation. An unreadable image is replaced by the next readable one then, so that every batch
            is full. None: for evaluation, unreadable images are left out.
    """

    def __init__(self, data: Any, seed: int | None = None) -> None:
        if not hasattr(data, "__len__"):
            raise DataError(f"{type(data).__name__} has no length: expected a data set with one, indexed by position")
        self._data = data
        self._seed = seed
        self._epoch = 0
        self.classes: int | None = None
        """Of the model, where labels are learned: those outside are an error."""

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has other random numbers."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Item:
        unreadable: list[str] = []
        for candidate in range(index, index + len(self)):
            position = candidate % len(self)
            if self._seed is not None:
                seed_everything(self._seed, self._epoch, position)
            try:
                image, label = parts(self._data[position])
                if self.classes is not None and label is not None and not 0 <= label < self.classes:
                    raise DataError(
                        f"item {position} of the training data has the label {label}: expected 0 to "
                        f"{self.classes - 1}, as the model has {self.classes} classes"
                    )
                return Item(image, label, tuple(unreadable))
            except UnreadableImageError as error:
                unreadable.append(error.name)
            except OSError as error:  # what PIL raises, in a user's own data set
                unreadable.append(f"item {position} ({error})")
            if self._seed is None:
                return Item(None, None, tuple(unreadable))
        raise DataError(f"no image can be read: {unreadable[0]}")


def refuse_unreadable(names: list[str], count: int, kind: str) -> None:
    """
    Args:
        names: Of the images of a data set that could not be read.
        count: Of all its images.
        kind: `"training"`, `"evaluation"` or `"calibration"`.

    Raises:
        DataError: If they are more than `UNREADABLE_LIMIT`.
    """
    if len(names) > UNREADABLE_LIMIT * count:
        raise DataError(
            f"{len(names)} of {count} {kind} images can't be read, more than {UNREADABLE_LIMIT:.0%}: "
            + ", ".join(names[:5])
            + (", ..." if len(names) > 5 else "")
        )


def parts(item: Any) -> tuple[Tensor, int | None]:
    """Image and label of one item.

    Raises:
        DataError: If it is none of the kinds that `Items` names.
    """
    if isinstance(item, Mapping):
        image, label = item.get("pixel_values"), item.get("labels", item.get("label"))
    elif isinstance(item, (tuple, list)):
        image, label = item[0], item[1] if len(item) > 1 else None
    else:
        image, label = item, None
    if not isinstance(image, Tensor):
        found = f"a mapping with {sorted(item)}" if isinstance(item, Mapping) else type(image).__name__
        raise DataError(
            f"an item of the data is {found}: expected a tensor (3, height, width), alone, as (image, label), or as "
            "'pixel_values' of a mapping. Give the data set a transform that makes one"
        )
    return image, None if label is None else int(label)


def collate(items: list[Item]) -> Batch:
    """Stack items; those without an image are left out."""
    readable = [item for item in items if item.image is not None]
    labels = [item.label for item in readable]
    return Batch(
        torch.stack([item.image for item in readable]) if readable else torch.empty(0),  # type: ignore[misc]
        None if not readable or labels[0] is None else torch.tensor(labels),
        tuple(name for item in items for name in item.unreadable),
    )
