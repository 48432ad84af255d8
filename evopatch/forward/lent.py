"""What blocks are given, and may write to, as by `x += ...`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Lent:
    """A tensor for a block to run on, that is needed again as it was.

    Args:
        make: Makes it, again if need be.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._own = self.tensor = _counting(make)
        if torch.compiler.is_compiling():  # versions aren't to be had, and a copy costs nothing
            self.tensor = self._own.clone()
        else:
            self._version = self._own._version

    def unchanged(self) -> Tensor:
        """As it was made."""
        written = not torch.compiler.is_compiling() and self._own._version != self._version
        return self._make() if written else self._own


def _counting(make: Callable[[], Tensor]) -> Tensor:
    """Tensors made in inference mode don't count what is written to them."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return make()
