"""Whether as many tokens reach the blocks as there are places in the grid."""

from __future__ import annotations

from collections.abc import Sequence

from ..algorithm.rows import is_fixed
from ..errors import UnsupportedInputError


def check_tokens(found: int, prefix: int, grid: tuple[int, int], name: str) -> None:
    """Of a flat model, at its first block.

    Args:
        found: Tokens that came.
        prefix: `P`.
        grid: Rows and columns of the patch tokens.
        name: The host's path, for errors.

    Raises:
        UnsupportedInputError: If there are more.
    """
    rows, columns = grid
    if is_fixed(found) and found > prefix + rows * columns:
        raise UnsupportedInputError(
            f"{found} tokens reached the first block of '{name or 'model'}': expected {prefix} prefix tokens "
            f"and {rows}x{columns} patch tokens. The other {found - prefix - rows * columns}, such as prompts, "
            "would be taken for patch tokens, and for those of another place. Put them first and count them before "
            "evopatch.apply (num_prefix_tokens in timm), or leave the model unpatched"
        )


def check_stage(found: int, grids: Sequence[tuple[int, int]], stage: int, name: str) -> None:
    """Of a pyramid, at the first block of a stage.

    Args:
        found: Patch tokens that came.
        grids: Rows and columns of them, by stage.
        stage: From 0.
        name: The host's path, for errors.

    Raises:
        UnsupportedInputError: If there are more or fewer.
    """
    rows, columns = grids[stage]
    if found != rows * columns:
        raise UnsupportedInputError(
            f"{found} patch tokens reached stage {stage + 1} of '{name or 'model'}', which had {rows * columns} "
            f"({rows}x{columns}) at evopatch.apply: give images of the model's own size"
        )
