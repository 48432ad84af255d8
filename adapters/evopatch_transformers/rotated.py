"""Attention modules that rotate queries and keys by what has no axis for images: groups of tokens differ by image.

MLCD's are given a table, V-JEPA 2's make the places of their tokens of the number of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evopatch.algorithm.partition import merge_positions
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


class PlacedInterface(TappedInterface):
    """Mixin of a patched attention module that asks a method of its own where its tokens are."""

    def _evo_hand(self, tap: AttentionTap, others: dict[str, Any]) -> Any:
        kwargs = {name: value for name, value in others.items() if name != "position_mask"}  # None, as its layer says
        own: Any = next(iter(self._evo_trace.replaced))
        return _Placed(self, tap, kwargs, getattr(self, own))


class _Placed(Interface):
    """What the generated code of an attention module calls, for one call.

    Args:
        module: The attention module.
        tap: Of this call.
        kwargs: For the implementation.
        own: The module's method.
    """

    def __init__(self, module: Any, tap: AttentionTap, kwargs: dict[str, Any], own: Callable[..., Any]) -> None:
        super().__init__(module, tap, kwargs)
        self._own = own

    def places(self, x: Tensor, masks: None = None) -> tuple[Tensor, ...]:
        """
        Args:
            x: `(B, M, C)`.
            masks: None, since all tokens are there.

        Returns:
            Frame, row and column: `(T,)` each, or `(B, 1, M)` of the compact set, where a group is at its mean place.
        """
        partition = self._tap.partition
        if partition is None:
            return tuple(self._own(x))
        places = torch.stack(self._own(partition.group), dim=-1).float()
        return merge_positions(places, partition, 0).to(x.dtype).unbind(-1)
