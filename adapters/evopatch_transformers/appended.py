"""Attention modules that are given more tokens than their layer: X-CLIP's, with a message of other frames behind."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from evopatch.algorithm.partition import Partition
from evopatch.forward.tap import AttentionTap

from .interface import Interface, TappedInterface


class AppendedInterface(TappedInterface):
    """Mixin of such a patched attention module."""

    rows: ClassVar[int] = 1
    """So many more."""

    def _evo_interface(self, tap: AttentionTap, kwargs: dict[str, Any]) -> Interface:
        return _Appended(self, tap, kwargs)


class _Appended(Interface):
    """What its generated code calls, for one call."""

    def _shown(self, partition: Partition) -> Partition:
        return partition.appended(self._module.rows)

    def _prepared(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor | None:
        rows = self._module.rows
        bias = self._tap.prepare(query[:, :, :-rows], key[:, :, :-rows], mask, scale)
        return None if bias is None else F.pad(bias, (0, rows))
