"""Evaluation data, before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..measure.accuracy import Evaluation, evaluate
from ..patching.handle import Patched
from .items import Batch, Items, collate, refuse_unreadable


class EvaluationData:
    """A user's evaluation data.

    Args:
        data: As for `Items`.
        batch_size: Images per forward.

    Raises:
        DataError: If there is no readable image.
    """

    def __init__(self, data: Dataset[Any], batch_size: int) -> None:
        self._data, self._batch_size = data, batch_size
        self._items = Items(data, labelled=False)
        self.unreadable: dict[str, None] = {}
        """Names of images that could not be read, in the order in which they were met."""
        images = (item.image for item in map(self._items.__getitem__, range(len(self._items))))
        first = next((image for image in images if image is not None), None)
        if first is None:
            raise DataError("no images to evaluate on")
        self._size = cast(tuple[int, int, int], tuple(first.shape))

    def set_classes(self, number: int | None) -> None:
        """How many the model has: labels are looked at then, and those outside are an error, which names the image.
        None where it has other outputs than classes."""
        self._items = Items(self._data, labelled=number is not None)
        self._items.classes = number

    def run(self, patched: Patched[nn.Module], original: nn.Module | None = None) -> tuple[Evaluation, Evaluation]:
        """Of the unpatched (or original) and of the patched model."""
        first, second = evaluate(patched.model, self._batches(), [patched.config], self._size, original=original)
        return first, second

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in cast(Iterator[Batch], DataLoader(self._items, self._batch_size, collate_fn=collate)):
            self.unreadable |= dict.fromkeys(batch.unreadable)
            refuse_unreadable(list(self.unreadable), len(self._items), "evaluation")
            yield batch.images, batch.labels
