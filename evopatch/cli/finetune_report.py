"""What `evopatch finetune` prints at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .tables import console, counted, distance, distance_column, percent, print_table, table_of

if TYPE_CHECKING:
    from ..training.result import FinetuneResult


def report(model: str, result: FinetuneResult, from_random: bool, folder: Path) -> None:
    """Print what a run did.

    Args:
        model: Its name.
        result: What `evopatch.finetune` returned.
        from_random: Whether it began with random weights, or a random head.
        folder: Of the run.
    """
    print_table(_table(model, result, from_random))
    console.print(_summary(result, folder), highlight=False, soft_wrap=True)


def _table(model: str, result: FinetuneResult, from_random: bool) -> Table:
    from ..training.result import TIMED_BATCH

    title = f"{model}, batch {TIMED_BATCH} for images/s"
    if result.after is not None:
        title = f"{model}, {counted(result.after.images, 'image', 'images')}, batch {TIMED_BATCH} for images/s"
    apart = "KL" if result.after is None else distance_column(result.after)
    table = table_of(title, ("",), ("top-1 %", "agree %", apart, "FLOPs", "images/s"))
    rows = (
        ("unpatched", result.unpatched, result.speed.unpatched),
        ("patched, before", result.before, result.speed.patched),
        ("patched, trained", result.after, result.speed.patched),
    )
    for name, found, speed in rows:
        cells = ("-",) * 4
        if found is not None:
            # Beside random weights, being like the model before training says nothing.
            alike = ("-", "-") if from_random else (percent(found.agreement), distance(found))
            cells = (percent(found.top1), *alike, f"{found.flops:.3f}")
        table.add_row(name, *cells, f"{speed:.1f}")
    return table


def _summary(result: FinetuneResult, folder: Path) -> str:
    lines = [
        f"{result.steps} steps in {result.seconds / 60:.1f} minutes, {result.images_per_second:.1f} images/s; one "
        f"training step is {result.training_speed.ratio:.2f}x as fast as unpatched, one forward "
        f"{result.speed.ratio:.2f}x",
    ]
    if result.after is None:
        lines.append("nothing was evaluated: give --eval-data")
    unreadable = (*result.unreadable, *result.unreadable_evaluation)
    if unreadable:
        lines.append(f"{len(unreadable)} unreadable image(s) skipped: {', '.join(unreadable[:5])}")
    lines.append(f"the trained model: evopatch.load_pretrained('{folder / 'model'}'); log, settings, result: {folder}")
    return "\n".join(lines)
