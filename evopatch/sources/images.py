"""Images by name: a folder, a parquet or arrow file, a data set of the Hugging Face hub, or scikit-learn's digits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .dataset import Digits, Images, Split, Table, Transform, Tree, stamp_of_file
from .folders import open_folder, parts_of
from .image_files import SUFFIXES, image_files

DIGITS = "digits"
_KINDS = (
    "a folder with one subfolder per class, a folder of images without labels, a .parquet or .arrow file, or "
    f"'{DIGITS}'"
)
_IMAGE_COLUMNS = ("image", "img", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "eval": ("val", "validation", "test")}


def open_images(source: str | Path, transform: Transform | None = None) -> Images:
    """The part of a source that is for training; all of it, if it has no parts. Arguments as for `open_part`."""
    images = open_part(source, "train", transform)
    assert images is not None
    return images


def open_evaluation(source: str | Path, transform: Transform | None = None) -> Images:
    """The part of a source that is for evaluation; all of it, if it has no parts. Arguments as for `open_part`."""
    return open_part(source, "eval", transform) or open_images(source, transform)


def open_every(source: str | Path, transform: Transform | None = None) -> Images:
    """All images of a source: of a folder every one under it, at any depth, by their paths in it; of other sources as
    `open_images` gives them. Without labels. Arguments and errors as for `open_part`."""
    path = Path(source)
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        images = open_images(source, transform)
    else:
        files = image_files(path, at_any_depth=True)
        images = Tree(path, sorted(file.relative_to(path).as_posix() for file in files))
        if len(images) == 0:
            raise DataError(f"{source} holds no images, at any depth: expected files {', '.join(SUFFIXES)}")
        images.transform = transform
    images.labels = None
    return images


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
    parts = parts_of(path, _SPLITS["eval"])
    if not parts:
        return open_folder(path) if split == "train" else None
    name = next((name for name in _SPLITS[split] if name in parts), None)
    if name is None and split == "train":
        raise DataError(
            f"{path} holds {' and '.join(parts)} and no train: expected a folder 'train' beside it, or images to take "
            f"whatever they are for: {path / parts[0]}"
        )
    if name is None:
        return None
    images = open_folder(path / name)
    images.part = name
    return images


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
        if path.suffix not in (".parquet", ".arrow"):
            raise DataError(f"{path} is a file, and no parquet: expected {_KINDS}") from error
        kind = "arrow (stream)" if path.suffix == ".arrow" else "parquet"
        raise DataError(f"{path} can't be read as {'an' if kind[0] == 'a' else 'a'} {kind} file: {error}") from error
    image, label = _columns(table.column_names, str(path))
    # What the library `datasets` writes beside its tables.
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label, {})
    classes = feature.get("names") if isinstance(feature, dict) else None
    labels = None if label is None else table.column(label).to_pylist()
    return Table(table.column(image), labels, classes, str(path), stamp_of_file(str(path)))


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
        raise DataError(f"{missing}; expected {_KINDS}")
    from .hub import no_retries

    try:
        import datasets

        with no_retries():
            found = datasets.load_dataset(name)
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"{missing}, and no data set of that name could be had from the hub ({reason}). Without network, give "
            f"--data {_KINDS}, and the model's weights with --checkpoint"
        ) from error
    return _part(found, name, split)


def _part(found: Any, name: str, split: Split) -> Images | None:
    import datasets

    key = None
    if isinstance(found, datasets.DatasetDict):
        key = next((key for key in _SPLITS[split] if key in found), None)
        part = None if key is None else found[key]
        if part is None and split == "train":
            raise DataError(f"{name} has the parts {sorted(found)}: expected 'train'")
    else:
        part = found if split == "train" else None
    if part is None:
        return None
    image, label = _columns(part.column_names, name)
    stamp = part._fingerprint  # before the cast
    if isinstance(part.features[image], datasets.Image):
        part = part.cast_column(image, datasets.Image(decode=False))
    feature = None if label is None else part.features[label]
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else None
    labels = None if label is None else list(part[label])
    images = Table(part[image], labels, classes, name, stamp)
    images.part = key
    return images
