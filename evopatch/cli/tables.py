"""What commands print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.segment import Segments
from rich.table import Table

if TYPE_CHECKING:
    from ..measure.accuracy import Evaluation

console = Console()
_ENDLESS = 100_000


def table_of(title: str, first: tuple[str, ...], columns: tuple[str, ...]) -> Table:
    """A table with some columns of text first and columns of numbers after them."""
    table = Table(title=title)
    for column in first:
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_table(table: Table) -> None:
    """To a terminal in its width; to a file or a program as wide as the figures are, so that none is cut."""
    if console.is_terminal:
        console.print(table)
        return
    wide = console.options.update(max_width=_ENDLESS)
    width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(Segments(console.render(table, wide.update(width=width))), crop=False, end="")


def percent(value: float | None) -> str:
    """With two places; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def counted(number: int, one: str, several: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {one if number == 1 else several}"


def megabytes(size: int) -> float:
    """Of 1e6 bytes."""
    return size / 1e6


def quality(result: Evaluation) -> tuple[str, ...]:
    """FLOPs, FLOPs of the blocks, top-1, top-5, agreement, distance."""
    flops = (f"{result.flops:.3f}", f"{result.blocks_flops:.3f}")
    return (*flops, percent(result.top1), percent(result.top5), percent(result.agreement), distance(result))


def quality_columns(result: Evaluation) -> tuple[str, ...]:
    """The columns of `quality`."""
    return "FLOPs", "FLOPs of\nblocks", "top-1\n%", "top-5\n%", "agree\n%", distance_column(result)


def distance(result: Evaluation) -> str:
    """To the unpatched model."""
    return f"{result.difference if result.kl is None else result.kl:.4f}"


def distance_column(result: Evaluation) -> str:
    """What `distance` is of this model."""
    from ..measure.kinds import MEASURES  # which imports torch

    return MEASURES[result.outputs].short


def write_json(file: Path | None, values: object) -> None:
    """Results, if a file for them was given."""
    if file is not None:
        file.write_text(json.dumps(values, indent=2) + "\n")
