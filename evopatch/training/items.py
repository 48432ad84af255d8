"""What a data set's items are, and how they become batches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import DataError, UnreadableImageError
from ..measure.fingerprint import fingerprint
from ..sources.dataset import Images
from ..sources.labels import class_number
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
        labelled: Whether labels are looked at; without, they may be anything, and items have none.

    Raises:
        DataError: If the data have no length or no positions, such as a loader of batches. For an item, if its image is
            no such tensor, or not finite.
    """

    def __init__(self, data: Any, seed: int | None = None, labelled: bool = True) -> None:
        for name, wanted in (("__len__", "length"), ("__getitem__", "items by position")):
            if not hasattr(data, name):
                raise DataError(
                    f"{type(data).__name__} has no {wanted}: expected a data set, indexed by position"
                    + (". Give the data set that the loader is of" if isinstance(data, DataLoader) else "")
                )
        self._data = data
        self._seed, self._labelled = seed, labelled
        self._epoch = 0
        self.classes: int | None = None
        """Of the model, where labels are looked at: those outside are an error."""

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has other random numbers."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._data)

    def listing(self) -> str | None:
        """What tells these images from as many others, where the data set can say."""
        data, places = self._data, list(range(len(self)))
        while isinstance(data, Subset):
            places, data = [int(data.indices[place]) for place in places], data.dataset
        own = data.listing() if isinstance(data, Images) else ""
        if data is self._data:
            return own or None
        return f"{own} {fingerprint({'places': torch.tensor(places)})}"

    def __getitem__(self, index: int) -> Item:
        unreadable: list[str] = []
        for candidate in range(index, index + len(self)):
            position = candidate % len(self)
            if self._seed is not None:
                seed_everything(self._seed, self._epoch, position)
            try:
                image, given = parts(self._data[position])
                self._check(image, position)
                return Item(image, self._label(given, position), tuple(unreadable))
            except UnreadableImageError as error:
                unreadable.append(error.name)
            except OSError as error:  # what PIL raises, in a user's own data set
                unreadable.append(f"item {position} ({error})")
            if self._seed is None:
                return Item(None, None, tuple(unreadable))
        raise DataError(f"no image can be read: {unreadable[0]}")

    def _check(self, image: Tensor, position: int) -> None:
        finite = bool(image.isfinite().all())
        if image.dim() == 3 and image.is_floating_point() and finite:
            return
        wrong = "" if finite else ", and not finite"
        raise DataError(
            f"{self._name(position)} is {tuple(image.shape)} {image.dtype}{wrong}: expected finite floating-point "
            "numbers (3, height, width), normalised as the model expects. Give the data set a transform that makes such"
        )

    def _label(self, given: Any, position: int) -> int | None:
        if given is None or not self._labelled:
            return None
        label = class_number(given, partial(self._name, position))
        if self.classes is not None and not 0 <= label < self.classes:
            name, classes = self._name(position), self.classes
            raise DataError(
                f"{name} has the label {label}: expected 0 to {classes - 1}, as the model has {classes} classes. "
                "Number the classes of the data as the model does, or give it a head for them"
            )
        return label

    def _name(self, position: int) -> str:
        data: Any = self._data
        place = position
        while isinstance(data, Subset):
            data, place = data.dataset, data.indices[place]
        kind = "evaluation" if self._seed is None else "training"
        return data.name(place) if isinstance(data, Images) else f"item {position} of the {kind} data"


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


def parts(item: Any) -> tuple[Tensor, Any]:
    """Image of one item, and its label as it is given; None where there is none.

    Raises:
        DataError: If it is none of the kinds that `Items` names.
    """
    if isinstance(item, Mapping):
        labels = item.get("labels")
        image, label = item.get("pixel_values"), item.get("label") if labels is None else labels
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
    return image, label


def other_numbers(item: Any) -> list[str]:
    """Names of whole numbers in a mapping without a label that might be one."""
    if not isinstance(item, Mapping) or parts(item)[1] is not None:
        return []
    return sorted(str(name) for name, value in item.items() if _is_whole(value))


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_floating_point()
    return isinstance(value, int) and not isinstance(value, bool)


def collate(items: list[Item]) -> Batch:
    """Stack items; those without an image are left out.

    Raises:
        DataError: If images are of different sizes, or only some have labels.
    """
    readable = [item for item in items if item.image is not None]
    sizes = sorted({tuple(item.image.shape) for item in readable if item.image is not None})
    if len(sizes) > 1:
        raise DataError(
            f"images of one batch are of the sizes {', '.join(map(str, sizes))}: expected one (3, height, width), as "
            "the model takes them. Resize or crop them in the data set's transform"
        )
    labels = [item.label for item in readable]
    if None in labels and labels.count(None) < len(labels):
        raise DataError(f"{labels.count(None)} of {len(labels)} images of a batch have no label: expected all or none")
    return Batch(
        torch.stack([item.image for item in readable]) if readable else torch.empty(0),  # type: ignore[misc]
        None if not readable or labels[0] is None else torch.tensor(labels),
        tuple(name for item in items for name in item.unreadable),
    )
