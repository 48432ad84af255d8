"""A folder of images, or with one subfolder per class."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DataError
from ..progress import errors
from .dataset import Files
from .image_files import Sieve, image_files, visible
from .labels import whole_numbers


def open_folder(path: Path) -> Files:
    """Images without labels, or one subfolder per class. Classes are numbered in the order of their names, by number
    where all names are whole ones.

    Raises:
        DataError: If it holds neither, or both.
    """
    files = image_files(path, at_any_depth=False)
    is_image = Sieve()
    by_class = {name: _images_in(path / name, is_image) for name in _class_names(path)}
    full = [name for name, found in by_class.items() if found]
    if files and full:
        raise DataError(
            f"{path} holds both images ({len(files)}, such as {min(files).name}) and subfolders with images "
            f"({_some(full)}): expected one subfolder per class, or images alone, which have no labels then. Move "
            "either of them away"
        )
    if files:
        return Files(sorted(map(str, files)), None)
    if not full:
        raise DataError(f"{path}: expected images, or one subfolder with images per class; no images were found")
    is_image.report(path)
    if empty := [name for name in by_class if name not in full]:
        # Left out, they would change the numbers of those behind them.
        text = f"in {path} {len(empty)} folder(s) without images are counted as classes: {_some(empty)}"
        errors.print(text, highlight=False, markup=False, soft_wrap=True)
    labels = [label for label, found in enumerate(by_class.values()) for _ in found]
    return Files([file for found in by_class.values() for file in found], labels, list(by_class))


def parts_of(path: Path, evaluation: tuple[str, ...]) -> list[str]:
    """Of a data set with parts, the folders that are its parts; none where its folders are classes.

    Args:
        path: The folder that holds them.
        evaluation: How parts for evaluation are named; the other one is `train`.

    Raises:
        DataError: If there are a folder `train` and others with images, and none of these.
    """
    names = _class_names(path)
    parts = [name for name in names if name in ("train", *evaluation)]
    if not parts:
        return []
    if parts == ["train"] or "train" not in parts:
        classes = [name for name in names if name not in parts and _images_in(path / name, Sieve())]
        if classes and "train" not in parts:
            return []  # a class may be named "test"
        if classes:
            raise DataError(
                f"{path} holds the folder train, as data sets with parts do, and others with images "
                f"({_some(classes)}): expected {', '.join(evaluation[:-1])} or {evaluation[-1]} beside it. If train is "
                f"a class, give that folder another name; if it is all there is to take, give {path / 'train'}"
            )
    if beside := image_files(path, at_any_depth=False):
        text = f"{path}: {len(beside)} image(s) beside {_some(parts)}, such as {min(beside).name}, belong to no part"
        errors.print(text, highlight=False, markup=False, soft_wrap=True)
    return parts


def _class_names(path: Path) -> list[str]:
    names = visible(entry.name for entry in os.scandir(path) if entry.is_dir())
    numbers = whole_numbers(names)
    return sorted(names) if numbers is None else [name for _, name in sorted(zip(numbers, names, strict=True))]


def _images_in(folder: Path, is_image: Sieve) -> list[str]:
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = visible(folders)
        found += [(place, name) for name in names if is_image(name)]
    return [os.path.join(*file) for file in sorted(found)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
