"""Images with their labels, wherever they are kept."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch.utils.data import Dataset

from ..errors import DataError, UnreadableImageError
from .labels import class_number
from .pixels import as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Any]
Split = Literal["train", "eval"]


class Images(Dataset[tuple[Any, int | None]], ABC):
    """Images, and their labels if they have any.

    Args:
        count: How many.
        labels: By position; None for images without.
        classes: Their names in the order of the labels, if the source says so.
    """

    def __init__(self, count: int, labels: Sequence[int] | None, classes: Sequence[str] | None = None) -> None:
        self._count = count
        self.labels = labels
        """By position; set it to None to do without."""
        self.class_names = None if classes is None else tuple(classes)
        self.transform: Transform | None = None
        """What makes a tensor `(3, height, width)` of a PIL image."""
        self.part: str | None = None
        """The name of the source's part that they are; None where it has no parts."""

    @abstractmethod
    def encoded(self, index: int) -> str | bytes | Image | None:
        """A path, encoded bytes, or a PIL image; None where it is missing."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a message calls the image."""

    def stamp(self, index: int) -> str:
        """What tells, without reading it, that an image isn't the one of that name from before; `""` if nothing."""
        return ""

    def listing(self) -> str:
        """What tells these images from others without reading them: of their names the last two parts, as folders may
        be moved, and their labels, in their order."""
        digest = hashlib.sha256()
        for index in range(self._count):
            label = None if self.labels is None else self.labels[index]
            digest.update(f"{self.name(index).split(os.sep)[-2:]} {label}\n".encode())
        return digest.hexdigest()[:16]

    @property
    def classes(self) -> int | None:
        """How many there are, if the source says so."""
        return None if self.class_names is None else len(self.class_names)

    def number_as(self, names: Sequence[str], where: str) -> None:
        """Take the numbers that other images have for the same classes; a folder numbers those that it holds.

        Args:
            names: Of the others, in the order of their labels.
            where: What a message calls these images.

        Raises:
            DataError: If there is a class that the others don't have.
        """
        if self.class_names is None or self.labels is None or self.class_names == tuple(names):
            return
        if unknown := [name for name in self.class_names if name not in names]:
            raise DataError(
                f"{where} has classes that the training data don't have: {', '.join(unknown[:5])}; expected some of "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )
        places = {name: number for number, name in enumerate(names)}
        self.number([places[name] for name in self.class_names], names)

    def number(self, numbers: Sequence[int], names: Sequence[str]) -> None:
        """Give classes other numbers. Labels that are those of no class stay as they are, to be refused by name.

        Args:
            numbers: By those that they have now.
            names: Of all classes, in the order of the new numbers.
        """
        if self.labels is not None:
            places = dict(enumerate(numbers))
            self.labels = [places.get(label, label) for label in self.labels]
        self.class_names = tuple(names)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Any, int | None]:
        """One image and its label.

        Raises:
            UnreadableImageError: If the image is damaged.
            DataError: If its label is no whole number.
        """
        import PIL.Image

        source = self.encoded(index)
        if source is None:
            raise UnreadableImageError(self.name(index), ValueError("it is missing"))
        try:
            if isinstance(source, PIL.Image.Image):
                image = as_rgb(source)
            else:
                with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                    image = as_rgb(opened)
        # What PIL's decoders raise.
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise UnreadableImageError(self.name(index), error) from error
        transformed = image if self.transform is None else self.transform(image)
        return transformed, None if self.labels is None else class_number(self.labels[index], partial(self.name, index))


class Digits(Images):
    """scikit-learn's 1797 handwritten digits, 8 px."""

    def __init__(self, split: Split) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        rows = range(len(digits.target))
        train, test = train_test_split(rows, test_size=0.25, stratify=digits.target, random_state=0)
        self._rows = train if split == "train" else test
        self._pixels = (digits.images * (255 / 16)).round().astype("uint8")
        super().__init__(len(self._rows), digits.target[self._rows], [str(number) for number in range(10)])
        self.part = split

    def encoded(self, index: int) -> str | bytes | Image | None:
        import PIL.Image

        return PIL.Image.fromarray(self._pixels[self._rows[index]])

    def name(self, index: int) -> str:
        return f"digit {self._rows[index]}"


class Files(Images):
    """Image files."""

    def __init__(self, paths: list[str], labels: Sequence[int] | None, classes: Sequence[str] | None = None) -> None:
        super().__init__(len(paths), labels, classes)
        self._paths = paths

    def encoded(self, index: int) -> str | bytes | Image | None:
        return self._paths[index]

    def name(self, index: int) -> str:
        return self._paths[index]

    def stamp(self, index: int) -> str:
        return stamp_of_file(self._paths[index])


class Tree(Files):
    """Image files without labels, named by their paths in a folder."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        super().__init__([str(folder / name) for name in names], None)
        self._names = names

    def name(self, index: int) -> str:
        return self._names[index]


class Table(Images):
    """Rows of a table: a column of encoded images, bytes or structs with `bytes` and `path`.

    Args:
        column: One image a row.
        labels: As for `Images`.
        classes: As for `Images`.
        where: What a message calls the table.
        stamp: Of the whole table.
    """

    def __init__(
        self, column: Any, labels: Sequence[int] | None, classes: Sequence[str] | None, where: str, stamp: str
    ) -> None:
        super().__init__(len(column), labels, classes)
        self._column, self._where, self._stamp = column, where, stamp

    def encoded(self, index: int) -> str | bytes | Image | None:
        value = self._value(index)
        if isinstance(value, dict):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        return cast("str | bytes | Image | None", value)

    def name(self, index: int) -> str:
        value = self._value(index)
        path = value.get("path") if isinstance(value, dict) else None
        return f"{self._where} row {index}" + (f" ({path})" if path else "")

    def stamp(self, index: int) -> str:
        value = self._value(index)
        elsewhere = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else None
        return self._stamp + (f" {stamp_of_file(elsewhere)}" if elsewhere else "")

    def _value(self, index: int) -> Any:
        value = self._column[index]
        return value.as_py() if hasattr(value, "as_py") else value  # pyarrow's, or datasets'


def stamp_of_file(path: str) -> str:
    """Its size and when it was changed; `""` where it can't be told."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"
