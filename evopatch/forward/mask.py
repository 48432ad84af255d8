"""The key padding mask of one forward pass: read once, the same for all blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..algorithm.padding import padding_of
from ..algorithm.rows import exporting


class Mask:
    """Which tokens are left out of attention.

    Args:
        name: Of the block's input that says so; empty if there is none.
        prefix: `P`.
    """

    def __init__(self, name: str, prefix: int) -> None:
        self._name, self._prefix = name, prefix
        self._read: Any = None
        self._first: int | None = None
        self.left_out: Tensor | None = None
        """`(B, T)` bool, True for tokens that no other attends to; None without a mask."""
        self.whole: Tensor | None = None
        """`(B or 1, H or 1, T or 1, T)`, as it was given."""

    def read(self, index: int, inputs: Mapping[str, Any], x: Tensor, refuse: Callable[[str, int], None]) -> None:
        """Before a block.

        Args:
            index: Its place.
            inputs: What it gets beside the tokens.
            x: `(B, T, C)`, or `(B, M, C)` inside a run.
            refuse: What raises where a mask says anything else; takes what to call it and the block's index.

        Raises:
            UnsupportedInputError: If this is no key padding mask, or not that of the block before. A RuntimeError later
                where values aren't to be waited for: on accelerators, compiled and exported.
        """
        mask = inputs.get(self._name) if self._name else None
        known, self._first = self._first is not None, index if self._first is None else self._first
        if mask is self._read:
            if self.left_out is not None and self.whole is not None:
                self.left_out, self.whole = self.left_out.to(x.device), self.whole.to(x.device)
            return
        if mask is None or (known and self._read is None):
            refuse(f"{self._name}, to some blocks only,", index)
            return
        tokens = mask.shape[-1]
        square = mask.dim() < 2 or mask.shape[-2] in (1, tokens)
        if mask.dim() > 4 or not square or (not known and tokens != x.shape[1]):
            refuse(f"{self._name} of shape {tuple(mask.shape)}", index)
        whole = mask[(None,) * (4 - mask.dim())]
        left_out, holds = padding_of(whole, self._prefix)
        left_out = left_out.expand(x.shape[0], -1)
        # Checkpoints hand on copies when they compute a block anew.
        if self.left_out is not None:
            holds = holds & (left_out == self.left_out.to(left_out.device)).all()
        self._check(holds, index, refuse)
        self._read, self.left_out, self.whole = mask, left_out, whole

    def _check(self, holds: Tensor, index: int, refuse: Callable[[str, int], None]) -> None:
        what = f"{self._name} that is more than a key padding mask, or another one at every block,"
        if holds.device.type == "cpu" and not torch.compiler.is_compiling() and not exporting():
            if not holds:
                refuse(what, index)
            return
        torch._assert_async(holds, f"a patched model was given {what} which it can't honour")
