"""Whether blocks are given what the ones before them returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Chain:
    """Of one forward pass whose host does something between the blocks.

    Tokens that were reordered, or are those of another image, are no longer those that a partition was made of. Nobody
    can see that in them without reading values, but they are another tensor then.
    """

    def __init__(self) -> None:
        self._returned: dict[int, Any] = {}
        self._broken: dict[int, bool] = {}

    def given(self, index: int, tokens: Tensor) -> None:
        """Before a block. What was found at first holds: the input of a block that is computed anew may have been
        moved."""
        last = max((i for i in self._returned if i < index), default=None)
        if index not in self._broken and last is not None:
            self._broken[index] = not _is_same(self._returned[last], tokens)

    def returned(self, index: int, tokens: Tensor) -> None:
        """After a block."""
        self._returned[index] = _mark(tokens)

    def is_broken_at(self, index: int) -> bool:
        """Whether a block was given something else."""
        return self._broken.get(index, False)


def _mark(tokens: Tensor) -> Any:
    """The tensor itself would stay in memory."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tokens):
        return tokens
    return tokens.device, tokens.shape, tokens.data_ptr()


def _is_same(mark: Any, tokens: Tensor) -> bool:
    if isinstance(mark, Tensor):
        return mark is tokens
    found = _mark(tokens)
    if isinstance(found, Tensor):
        return False
    # What goes to the next device of several is a copy.
    return bool(found == mark or (found[0] != mark[0] and found[1] == mark[1]))
