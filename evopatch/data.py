"""Labelled images from a folder or a parquet file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError

Transform = Callable[[Any], Tensor]


class ParquetImages(Dataset[tuple[Tensor, int]]):
    """A parquet file with the columns `image` (a struct with the encoded `bytes`, or the bytes) and `label`."""

    def __init__(self, path: Path, transform: Transform) -> None:
        import pyarrow.parquet as parquet

        try:
            table = parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} can't be read as a parquet file: {error}") from error
        if missing := {"image", "label"} - set(table.column_names):
            raise DataError(
                f"{path}: found the columns {table.column_names}, without {sorted(missing)}: expected "
                "'image' (encoded bytes) and 'label' (class index)"
            )
        self._images = table.column("image")
        self._labels = table.column("label").to_pylist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        value = self._images[index].as_py()
        encoded = value["bytes"] if isinstance(value, dict) else value
        with Image.open(io.BytesIO(encoded)) as image:
            return self._transform(image.convert("RGB")), int(self._labels[index])


def open_images(path: Path, transform: Transform) -> Dataset[tuple[Tensor, int]]:
    """A parquet file, or a folder with one subfolder per class in class order.

    Raises:
        DataError: If there is no such path, it is empty, or of another layout.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected a .parquet file or an ImageFolder directory")
    if path.is_file():
        dataset: Any = ParquetImages(path, transform)
    else:
        from torchvision.datasets import ImageFolder

        try:
            dataset = ImageFolder(str(path), transform)
        except FileNotFoundError as error:
            raise DataError(f"{path}: expected one subfolder with images per class: {error}") from error
    if len(dataset) == 0:
        raise DataError(f"{path} holds no images")
    return dataset  # type: ignore[no-any-return]
