"""Attention modules that are given several windows together, which are images of their own to the model's other layers:
those of LW-DETR and RF-DETR."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evopatch.algorithm.partition import Partition
from evopatch.forward.tap import AttentionTap

from .interface import Interface, TappedInterface


class JoinedInterface(TappedInterface):
    """Mixin of such a patched attention module of LW-DETR."""

    config: Any

    @staticmethod
    def windows(config: Any) -> int:
        """How many windows an image has."""
        return int(config.num_windows)

    @staticmethod
    def joins(layer: Any) -> bool:
        """Whether a layer's attention is given them all."""
        return not layer.window

    def _evo_interface(self, tap: AttentionTap, kwargs: dict[str, Any]) -> Interface:
        return _Joined(self, tap, kwargs, self.windows(self.config))


class GloballyJoined(JoinedInterface):
    """The same of RF-DETR."""

    @staticmethod
    def windows(config: Any) -> int:
        """By how many there are in a row."""
        return int(config.num_windows) ** 2

    @staticmethod
    def joins(layer: Any) -> bool:
        """See `JoinedInterface`."""
        return bool(layer.global_attention)


class _Joined(Interface):
    """What its generated code calls, for one call."""

    def __init__(self, module: Any, tap: AttentionTap, kwargs: dict[str, Any], windows: int) -> None:
        super().__init__(module, tap, kwargs)
        self._windows = windows

    def _shown(self, partition: Partition) -> Partition:
        return partition.joined(self._windows)

    def _prepared(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor | None:
        images = query.shape[0]
        if self._tap.observe:  # what the readout of each window says of the tokens in it
            query, key = (x.unflatten(2, (self._windows, -1)).transpose(1, 2).flatten(0, 1) for x in (query, key))
        bias = self._tap.prepare(query, key, mask, scale)
        return None if bias is None else bias.reshape(images, 1, 1, -1)
