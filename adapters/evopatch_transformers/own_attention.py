"""Layers of transformers whose attention modules compute attention themselves, not by transformers' interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evopatch.algorithm.partition import spread_attention
from evopatch.errors import UnsupportedModelError
from evopatch.forward.block import SlowFastBlock, TappedAttention
from evopatch.forward.spec import qualified
from evopatch.forward.tap import AttentionTap
from evopatch.rewrite.fast_paths import forward_of
from evopatch.rewrite.tracing import TraceSpec, attention_cores

from .layer import SlowFastLayer
from .recording import is_recorded


def check_fused(layer: nn.Module, name: str, trace: TraceSpec) -> None:
    """
    Args:
        layer: To be patched.
        name: Fully qualified, for errors.
        trace: How it is to be traced.

    Raises:
        UnsupportedModelError: If its attention isn't fused: position biases that are for all tokens then meet logits of
            the compact set.
    """
    for path in attention_cores(layer, trace):
        attention = layer.get_submodule(path)
        if "scaled_dot_product_attention" not in forward_of(attention).__code__.co_names:
            raise UnsupportedModelError(
                f"{qualified(name, path)} ({type(attention).__name__}) adds a position bias to logits of its own: "
                "expected fused attention. Create the model with attn_implementation='sdpa', which is its default"
            )


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
        return tokens, spread_attention(weights, tap.partition.shown(tap.behind))

    def _evo_hand(self, tap: AttentionTap, others: dict[str, Any]) -> Any:
        # A model's keyword arguments, such as return_dict, come down to every module.
        return super()._evo_hand(tap, {name: value for name, value in others.items() if isinstance(value, Tensor)})
