"""Which files of a folder are images: by their names. Hidden ones, and those in hidden folders, are none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..progress import errors

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".avif",
)  # fmt: skip
"""Of files that PIL reads; of those with several frames the first."""


class Sieve:
    """Tells images from other files, and counts the others but for hidden ones."""

    def __init__(self) -> None:
        self._others: Counter[str] = Counter()

    def __call__(self, file: str) -> bool:
        """Whether a file is an image."""
        path = Path(file)
        if not visible([path.name]):  # such as ._1.jpg, which macOS writes beside 1.jpg
            return False
        if path.suffix.lower() in SUFFIXES:
            return True
        self._others[path.suffix.lower() or "no suffix"] += 1
        return False

    def report(self, folder: Path) -> None:
        """Say on standard error what was left out of a folder."""
        if self._others:
            kinds = ", ".join(f"{suffix} ({number})" for suffix, number in self._others.most_common(5))
            text = f"{sum(self._others.values())} file(s) in {folder} left out, by their names no images: {kinds}"
            errors.print(text, highlight=False, markup=False, soft_wrap=True)


def visible(names: Iterable[str]) -> list[str]:
    """Those of files or folders that aren't hidden, as `.ipynb_checkpoints` is."""
    return [name for name in names if not name.startswith(".")]


def image_files(folder: Path, at_any_depth: bool) -> list[Path]:
    """The images in a folder, in no order. Where there are some, it says what else there is."""
    is_image, found = Sieve(), []
    for place, folders, names in os.walk(folder):
        folders[:] = visible(folders)
        found += [Path(place, name) for name in names if is_image(name)]
        if not at_any_depth:
            break
    if found:
        is_image.report(folder)
    return found
