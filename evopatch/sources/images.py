"""Images by name: a folder, a parquet or arrow file, a data set of the Hugging Face hub, or scikit-learn's digits."""

from __future__ import annotations

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from ..errors import DataError, UnreadableImageError

Transform = Callable[[Any], Any]
Split = Literal["train", "eval"]

DIGITS = "digits"
_IMAGE_COLUMNS = ("image", "img", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "eval": ("val", "validation", "test")}


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

    @abstractmethod
    def encoded(self, index: int) -> Any:
        """A path, encoded bytes, or a PIL image."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a message calls the image."""

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
        numbers = [list(names).index(name) for name in self.class_names]
        self.labels = [numbers[label] for label in self.labels]
        self.class_names = tuple(names)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Any, int | None]:
        """One image and its label.

        Raises:
            UnreadableImageError: If the image is damaged.
        """
        from PIL import Image

        source = self.encoded(index)
        if source is None:
            raise UnreadableImageError(self.name(index), ValueError("it is missing"))
        try:
            if isinstance(source, Image.Image):
                image = source.convert("RGB")
            else:
                with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                    image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL's decoders raise
            raise UnreadableImageError(self.name(index), error) from error
        transformed = image if self.transform is None else self.transform(image)
        return transformed, None if self.labels is None else int(self.labels[index])


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

    def encoded(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self._pixels[self._rows[index]])

    def name(self, index: int) -> str:
        return f"digit {self._rows[index]}"


class Files(Images):
    """Image files."""

    def __init__(self, paths: list[str], labels: Sequence[int] | None, classes: Sequence[str] | None = None) -> None:
        super().__init__(len(paths), labels, classes)
        self._paths = paths

    def encoded(self, index: int) -> Any:
        return self._paths[index]

    def name(self, index: int) -> str:
        return self._paths[index]


class Table(Images):
    """Rows of a table: a column of encoded images, bytes or structs with `bytes` and `path`."""

    def __init__(self, column: Any, labels: Sequence[int] | None, classes: Sequence[str] | None, where: str) -> None:
        super().__init__(len(column), labels, classes)
        self._column, self._where = column, where

    def encoded(self, index: int) -> Any:
        value = self._value(index)
        if isinstance(value, dict):
            return value["path"] if value.get("bytes") is None else value["bytes"]
        return value

    def name(self, index: int) -> str:
        value = self._value(index)
        path = value.get("path") if isinstance(value, dict) else None
        return f"{self._where} row {index}" + (f" ({path})" if path else "")

    def _value(self, index: int) -> Any:
        value = self._column[index]
        return value.as_py() if hasattr(value, "as_py") else value  # pyarrow's, or datasets'


def open_images(source: str | Path, transform: Transform | None = None) -> Images:
    """The part of a source that is for training; all of it, if it has no parts. Arguments as for `open_part`."""
    images = open_part(source, "train", transform)
    assert images is not None
    return images


def open_evaluation(source: str | Path, transform: Transform | None = None) -> Images:
    """The part of a source that is for evaluation; all of it, if it has no parts. Arguments as for `open_part`."""
    return open_part(source, "eval", transform) or open_images(source, transform)


def open_part(source: str | Path, split: Split, transform: Transform | None = None) -> Images | None:
    """One part of a source of images.

    Args:
        source: An ImageFolder directory (one subfolder per class); a folder of images, which have no labels then; a
            folder with such folders named `train` and `val`, `validation` or `test`; a `.parquet` or `.arrow` file with
            the columns `image` and maybe `label`; a folder written by `datasets.save_to_disk`; `"digits"`; or the name
            of a data set on the Hugging Face hub.
        split: Which part. A source without parts is all `"train"`.
        transform: What makes a tensor `(3, height, width)` of a PIL image.

    Returns:
        None if the source has no such part.

    Raises:
        DataError: If there is no such source, it is empty, or of another layout.
    """
    path = Path(source)
    if str(source) == DIGITS and not path.exists():
        images: Images | None = Digits(split)
    elif path.is_dir():
        images = _folder(path, split)
    elif path.is_file():
        images = _file(path) if split == "train" else None
    else:
        images = _hub(str(source), split)
    if images is not None:
        if len(images) == 0:
            raise DataError(f"{source} holds no images")
        images.transform = transform
    return images


def _folder(path: Path, split: Split) -> Images | None:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        return _part(datasets.load_from_disk(str(path)), str(path), split)
    if (path / "train").is_dir():
        parts = [path / name for name in _SPLITS[split] if (path / name).is_dir()]
        return _class_folders(parts[0]) if parts else None
    return _class_folders(path) if split == "train" else None


def _class_folders(path: Path) -> Images:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
    if files:
        return Files(files, None)
    try:
        folders = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: expected images, or one subfolder with images per class in class order: {error}"
        ) from error
    return Files([file for file, _ in folders.samples], folders.targets, folders.classes)


def _file(path: Path) -> Images:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_stream(file).read_all()
        else:
            table = pq.read_table(path)
    except (OSError, ValueError) as error:
        kind = "arrow (stream)" if path.suffix == ".arrow" else "parquet"
        raise DataError(f"{path} can't be read as {'an' if kind[0] == 'a' else 'a'} {kind} file: {error}") from error
    image, label = _columns(table.column_names, str(path))
    # What the library `datasets` writes beside its tables.
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label, {})
    classes = feature.get("names") if isinstance(feature, dict) else None
    labels = None if label is None else table.column(label).to_pylist()
    return Table(table.column(image), labels, classes, str(path))


def _columns(names: Sequence[str], where: str) -> tuple[str, str | None]:
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise DataError(
            f"{where}: found the columns {list(names)}: expected one named {' or '.join(map(repr, _IMAGE_COLUMNS))} "
            "with encoded images, and maybe 'label' with class indices"
        )
    return image, next((name for name in _LABEL_COLUMNS if name in names), None)


def _hub(name: str, split: Split) -> Images | None:
    missing = f"{name}: no such file or folder"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".parquet", ".arrow")):
        raise DataError(f"{missing}; expected an ImageFolder directory, a .parquet or .arrow file, or '{DIGITS}'")
    from .hub import no_retries

    try:
        import datasets

        with no_retries():
            found = datasets.load_dataset(name)
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"{missing}, and no data set of that name could be had from the hub ({reason}). Without network, give "
            f"--data a folder, a .parquet or .arrow file, or '{DIGITS}', and the model's weights with --checkpoint"
        ) from error
    return _part(found, name, split)


def _part(found: Any, name: str, split: Split) -> Images | None:
    import datasets

    if isinstance(found, datasets.DatasetDict):
        part = next((found[key] for key in _SPLITS[split] if key in found), None)
        if part is None and split == "train":
            raise DataError(f"{name} has the parts {sorted(found)}: expected 'train'")
    else:
        part = found if split == "train" else None
    if part is None:
        return None
    image, label = _columns(part.column_names, name)
    if isinstance(part.features[image], datasets.Image):
        part = part.cast_column(image, datasets.Image(decode=False))
    feature = None if label is None else part.features[label]
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else None
    labels = None if label is None else list(part[label])
    return Table(part[image], labels, classes, name)
