"""Attention modules that rotate queries and keys by tables without an axis for images, as MLCD's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from evopatch.forward.tap import AttentionTap

from .interface import Interface, TappedInterface


class RotatedInterface(TappedInterface):
    """Mixin of a patched attention module."""

    def _evo_hand(self, tap: AttentionTap, others: dict[str, Any]) -> Any:
        rotation: Any = next(iter(self._evo_trace.replaced))
        return _Rotated(super()._evo_hand(tap, others), rotation)


class _Rotated:
    """What the generated code of an attention module calls, for one call.

    Args:
        interface: Takes what the interface takes.
        rotation: The model's own function.
    """

    def __init__(self, interface: Interface, rotation: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._rotation = rotation
        self.asking, self.interface = interface.asking, interface.interface

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            query: `(B, M, H, D)`, key likewise.
            cos: `(1, T, D)`, or `(1, B, 1, M, D)` of the compact set; sin likewise.
        """
        if cos.dim() == 5:
            cos, sin = cos[0, :, 0], sin[0, :, 0]
        return self._rotation(query, key, cos, sin)
