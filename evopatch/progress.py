"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

errors = Console(stderr=True)


@contextmanager
def progress_bar(description: str, total: int, disable: bool = False) -> Iterator[Any]:
    """A bar that yields its own advance function; that takes the number of steps done and, if given, a new text."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=disable) as progress:
        task = progress.add_task(description, total=total)

        def advance(done: int = 1, text: str | None = None) -> None:
            progress.update(task, advance=done, description=text)

        yield advance
