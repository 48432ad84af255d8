"""Whether as many tokens reach the blocks as there are places in the grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..algorithm.rows import exporting, is_fixed
from ..errors import UnsupportedInputError
from .host_state import HostState


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


def check_size(images: Tensor, stride: int, state: HostState) -> None:
    """Whether images make the grid that a host's position biases are for: the number of tokens doesn't tell it from
    another one with as many.

    Args:
        images: `(B, 3, height, width)`.
        stride: Pixels between two patch tokens.
        state: The host's.

    Raises:
        UnsupportedInputError: If they make another one, unless every block runs as unpatched.
    """
    if not state.active:
        return
    assert state.spec.pyramid is not None
    rows, columns = state.spec.pyramid.grids[0]
    # Compiled with symbolic sizes, these are numbers from here on: all that follows from them would take minutes.
    if not exporting() and (images.shape[-2], images.shape[-1]) == (rows * stride, columns * stride):
        return
    found = tuple(-(-side // stride) for side in images.shape[-2:])
    if found != (rows, columns):
        raise UnsupportedInputError(
            f"images of {images.shape[-2]}x{images.shape[-1]} px make {found[0]}x{found[1]} patch tokens in "
            f"'{state.name or 'model'}', whose position biases are for {rows}x{columns}: give images of the model's "
            "own size"
        )
