"""What slow and fast queries would save of PVT's FLOPs, computed, not measured: behind "Why not PVT?" in docs/faq.md.

In every block the compact set asks and goes through the linear layers; the whole grid answers, through the convolution
that reduces it, and goes through the convolution of PVT v2's MLP. Choosing and matching tokens is counted once in each
stage, among all tokens of the grid, or inside windows of 49.

    python benchmarks/reduced_keys.py
"""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.table import Table

REDUCTIONS = (8, 4, 2, 1)
"""Tokens a side that become one key, by stage."""
KEEP = 0.5


class Kind(NamedTuple):
    """One size of PVT."""

    depths: tuple[int, ...]
    channels: tuple[int, ...]
    ratios: tuple[int, ...]
    """Of the MLP's hidden channels to its own."""
    patches: tuple[int, int] = (7, 3)
    """Pixels a side of the first patches, and tokens of later ones."""
    convolves: bool = True
    """The MLP has a convolution of 3 by 3."""


_WIDE = (64, 128, 320, 512)
KINDS = {
    "pvt_v2_b0": Kind((2, 2, 2, 2), (32, 64, 160, 256), (8, 8, 4, 4)),
    "pvt_v2_b1": Kind((2, 2, 2, 2), _WIDE, (8, 8, 4, 4)),
    "pvt_v2_b2": Kind((3, 4, 6, 3), _WIDE, (8, 8, 4, 4)),
    "pvt_v2_b3": Kind((3, 4, 18, 3), _WIDE, (8, 8, 4, 4)),
    "pvt_v2_b5": Kind((3, 6, 40, 3), _WIDE, (4, 4, 4, 4)),
    "PVT tiny": Kind((2, 2, 2, 2), _WIDE, (8, 8, 4, 4), (4, 2), False),
    "PVT medium": Kind((3, 4, 18, 3), _WIDE, (8, 8, 4, 4), (4, 2), False),
}


def block(kind: Kind, stage: int, tokens: int, rows: int) -> int:
    """Multiply-adds of one block on a grid of so many tokens, where so many rows ask."""
    c, ratio, reduction = kind.channels[stage], kind.ratios[stage], REDUCTIONS[stage]
    keys = tokens // reduction**2
    reducing = tokens * c * c if reduction > 1 else 0
    attention = 2 * rows * c * c + 2 * keys * c * c + 2 * rows * keys * c
    return attention + reducing + 2 * ratio * rows * c * c + kind.convolves * 9 * ratio * tokens * c


def patches(kind: Kind, size: int) -> int:
    """Multiply-adds of the convolutions before the stages."""
    total, before = 0, 3
    for stage, (tokens, channels) in enumerate(zip(grids(size), kind.channels, strict=True)):
        total += tokens * kind.patches[stage > 0] ** 2 * before * channels
        before = channels
    return total


def grids(size: int) -> list[int]:
    """Tokens in each stage."""
    return [(size // (4 * 2**stage)) ** 2 for stage in range(4)]


def share(kind: Kind, size: int, slow_fast: dict[int, int | None]) -> float:
    """What is left of the FLOPs.

    Args:
        kind: Of PVT.
        size: Pixels a side.
        slow_fast: Stages with slow and fast queries, and the size of the windows that tokens are matched in.
    """
    whole = left = patches(kind, size)
    for stage, (tokens, depth) in enumerate(zip(grids(size), kind.depths, strict=True)):
        own = depth * block(kind, stage, tokens, tokens)
        whole += own
        if stage in slow_fast:
            among = slow_fast[stage] or tokens
            own = depth * block(kind, stage, tokens, round(KEEP * tokens))
            own += round(tokens * among * (1 + KEEP) * kind.channels[stage])
        left += own
    return left / whole


def main() -> None:
    columns: dict[str, dict[int, int | None]] = {
        "stages 3, 4": {2: None, 3: None},
        "all": {0: None, 1: None, 2: None, 3: None},
        "all, windows in 1, 2": {0: 49, 1: 49, 2: None, 3: None},
    }
    table = Table("model", "px", *columns, title=f"FLOPs left, keep ratio {KEEP}")
    for name, kind in KINDS.items():
        for size in (224, 512):
            table.add_row(name, str(size), *(f"{share(kind, size, stages):.2f}" for stages in columns.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
