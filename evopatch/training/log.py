"""A run's log: JSON lines, and TensorBoard where it is installed, both as accelerate's trackers."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from ..version import VERSION

FILE = "log.jsonl"


class JsonLines(GeneralTracker):  # type: ignore[misc]
    """One JSON object per line, appended and flushed at once."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__(_blank=True)
        self._path = path

    @property
    def tracker(self) -> Path:
        return self._path

    def event(self, name: str, step: int | None = None, **values: Any) -> None:
        """Something other than figures of a step; for this log only."""
        self.log({"event": name, **values}, step)

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        line = {"time": round(time.time(), 3)} | ({} if step is None else {"step": step}) | values
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def tensorboard() -> list[str]:
    """TensorBoard's name for accelerate's `log_with`, where it is installed."""
    return ["tensorboard"] if any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))) else []


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"evopatch": VERSION}
    for name in ("torch", "timm", "transformers", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
