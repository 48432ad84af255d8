"""Progress bars on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

errors = Console(stderr=True)


SECONDS_BETWEEN_LINES = 30.0
"""Where there is no terminal to draw a bar on, such as in a batch job."""


@contextmanager
def progress_bar(description: str, total: int | None, disable: bool = False) -> Iterator[Any]:
    """A bar that yields its own advance function; that takes the number of steps done and, if given, a new text.
    `total` None: nobody knows how many there are."""
    if not disable and not errors.is_terminal:
        yield _lines(description, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=disable) as progress:
        task = progress.add_task(description, total=total)

        def advance(done: int = 1, text: str | None = None) -> None:
            progress.update(task, advance=done, description=text)

        yield advance


def _lines(description: str, total: int | None) -> Callable[..., None]:
    done, begin, last = 0, time.monotonic(), time.monotonic()

    def advance(steps: int = 1, text: str | None = None) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or (total is not None and done >= total and last > begin):
            last = now
            steps_of = done if total is None else f"{done}/{total}"
            errors.print(f"{text or description}: {steps_of}, {now - begin:.0f} s", highlight=False, soft_wrap=True)

    return advance
