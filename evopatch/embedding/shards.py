"""Rows of features in shards that survive being killed at any moment, and in one file at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from ..durable import publish
from ..errors import ConfigError, DataError
from ..training.differences import differences

METADATA = b"evopatch"
"""Where a file's schema holds, as JSON, what its features were made with, and which images could not be read."""
_SETTINGS = "settings.json"
_UNFINISHED = "unfinished-"


class Shards:
    """A folder beside the file that the features go to, with the rows of so many images in each shard.

    Args:
        output: The file.
        images: How many images there are.
        rows: Images of one shard.
    """

    def __init__(self, output: Path, images: int, rows: int) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.shards")
        self._images, self._rows = images, rows
        self.number = -(-images // rows)

    def images_of(self, shard: int) -> range:
        """Which images a shard is for."""
        return range(shard * self._rows, min((shard + 1) * self._rows, self._images))

    def finished(self) -> bool:
        """Whether the file is whole: shards go after it was written, so both are there only for a moment."""
        return self.output.exists()

    def begin(self, settings: Mapping[str, Any]) -> bool:
        """Make the folder, or take one that was begun with the same settings; by one process.

        Returns:
            Whether there was one.

        Raises:
            ConfigError: If it was begun with other settings, or the file is there already.
        """
        recorded = self.folder / _SETTINGS
        if self.output.exists() and not self.folder.exists():
            raise ConfigError(f"{self.output} is there already: give another file, or move it away")
        if not recorded.exists() and not self.finished():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(recorded, json.dumps(settings, indent=2, sort_keys=True).encode())
            return False
        if different := differences(self._recorded(), json.loads(json.dumps(settings))):
            raise ConfigError(
                f"{self.folder} was begun with other settings: {different}. Use the same ones, or give another file, "
                "or remove that folder to begin anew"
            )
        return True

    def _recorded(self) -> dict[str, Any]:
        # While the folder is removed, its record may go first.
        if self.finished():
            values: dict[str, Any] = _metadata(pq.read_schema(self.output))["settings"]
        else:
            values = json.loads((self.folder / _SETTINGS).read_text())
        return values

    def there(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return self._path(shard).exists()

    def write(
        self, shard: int, names: Sequence[str], features: Tensor, patches: Tensor | None, unreadable: Sequence[str]
    ) -> None:
        """One shard, whole or not at all.

        Args:
            shard: Which one.
            names: Of its images that could be read, in order.
            features: `(rows, C)`.
            patches: `(rows, N, C)`, or None.
            unreadable: Names of its other images.
        """
        columns = {"image": pa.array(names, pa.string()), "features": _array(features)}
        if patches is not None:
            columns["patch_features"] = _array(patches)
        table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps({"unreadable": list(unreadable)})})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        self._write(self._path(shard), buffer.getvalue())

    def merge(self) -> list[str]:
        """Make the one file of all shards, in the order of the images, and remove them; by one process.

        Returns:
            Names of the images that could not be read.

        Raises:
            DataError: If a shard is damaged, or there is no row.
        """
        if not self.finished():
            self._merge()
        shutil.rmtree(self.folder)
        return unreadable_in(self.output)

    def _merge(self) -> None:
        files = [self._read(shard) for shard in range(self.number)]
        unreadable = [name for file in files for name in _metadata(file.schema_arrow)["unreadable"]]
        if len(unreadable) == self._images:
            raise DataError(
                f"none of {self._images} image(s) can be read, such as {unreadable[0]}: expected at least one, so "
                f"{self.output} isn't written. Give images that PIL can open, and remove {self.folder}"
            )
        settings = json.loads((self.folder / _SETTINGS).read_text())
        # A shard without any image that could be read doesn't know how long features are.
        schema = next((file.schema_arrow for file in files if file.metadata.num_rows), files[0].schema_arrow)
        schema = schema.with_metadata({METADATA: json.dumps({"settings": settings, "unreadable": unreadable})})
        temporary = self.folder / f"{_UNFINISHED}{self.output.name}"
        with pq.ParquetWriter(temporary, schema) as writer:
            for file in files:
                for row_group in range(file.num_row_groups if file.metadata.num_rows else 0):
                    writer.write_table(file.read_row_group(row_group).replace_schema_metadata(schema.metadata))
        publish(temporary, self.output)

    def _read(self, shard: int) -> pq.ParquetFile:
        path = self._path(shard)
        try:
            file = pq.ParquetFile(path)
            number = file.metadata.num_rows + len(_metadata(file.schema_arrow)["unreadable"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is damaged: {error}. Remove it and give the same command again") from error
        if number != len(self.images_of(shard)):
            raise DataError(
                f"{path} is of {number} images, expected {len(self.images_of(shard))}: remove it and give the same "
                "command again"
            )
        return file

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.parquet"

    def _write(self, path: Path, content: Any) -> None:
        temporary = path.with_name(f"{_UNFINISHED}{path.name}")
        temporary.write_bytes(content)
        publish(temporary, path)


def unreadable_in(output: Path) -> list[str]:
    """Names of the images that could not be read, as a file of features says."""
    names: list[str] = _metadata(pq.read_schema(output))["unreadable"]
    return names


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((schema.metadata or {})[METADATA])
    return values


def _array(values: Tensor) -> pa.Array:
    """`(rows, ...)` as an arrow array of nested lists of fixed lengths."""
    array = pa.array(values.contiguous().flatten().numpy())
    for length in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array
