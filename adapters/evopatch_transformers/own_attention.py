"""Layers of transformers whose attention modules compute attention themselves, not by transformers' interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evopatch.algorithm.partition import spread_attention
from evopatch.forward.block import SlowFastBlock, TappedAttention
from evopatch.forward.tap import AttentionTap

from .layer import SlowFastLayer
from .recording import is_recorded


class OwnLayer(SlowFastLayer):
    """Mixin of a patched layer."""

    @staticmethod
    def _evo_traceable(block: nn.Module, cores: tuple[str, ...]) -> nn.Module:
        return SlowFastBlock._evo_traceable(block, cores)


class OwnAttention(TappedAttention):
    """Mixin of a patched attention module, which gives its weights beside the tokens."""

    def _evo_run(self, tap: AttentionTap, *args: Any, **kwargs: Any) -> Any:
        out = super()._evo_run(tap, *args, **kwargs)
        if tap.partition is None or not is_recorded("attentions"):
            return out
        tokens, weights = out
        return tokens, spread_attention(weights, tap.partition)

    def _evo_hand(self, tap: AttentionTap, others: dict[str, Any]) -> Any:
        # A model's keyword arguments, such as return_dict, come down to every module.
        return super()._evo_hand(tap, {name: value for name, value in others.items() if isinstance(value, Tensor)})
