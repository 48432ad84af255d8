"""The attention interface of transformers: where an attention module hands over its queries, keys and values.

Every attention module looks its implementation (eager, sdpa, flash ...) up in a table by a name in its config, and
passes it the keyword arguments that its model was called with. `TappedInterface` keeps that, with the tap in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evopatch.algorithm.partition import Partition, spread_attention
from evopatch.errors import AttentionNotFoundError, UnsupportedModelError
from evopatch.forward.block import TappedAttention
from evopatch.forward.tap import AttentionTap
from evopatch.rewrite.classes import host_class
from evopatch.rewrite.tracing import TraceSpec, attention_cores

from .recording import is_recorded

CORE_NAMES = frozenset({"ALL_ATTENTION_FUNCTIONS"})
_TRACED = "evopatch_traced"
# By how they are called: implementations of transformers that need masks of a form of their own, or take none. Those
# that somebody registered take what is added to the logits as their attention mask, as the interface has it.
_TAKE_NO_BIAS = ("flash", "flex", "paged")
_FROM_A_HUB = "/"


def _call(module: Any, query: fx.Proxy, key: fx.Proxy, value: fx.Proxy, attention_mask: Any, **kwargs: Any) -> fx.Proxy:
    """Stands in the table while a module is traced: leaves a node in the graph."""
    return query.tracer.create_proxy("call_function", _call, (query, key, value, attention_mask), kwargs)


ALL_ATTENTION_FUNCTIONS.register(_TRACED, _call)
CORES = {_call: "interface"}


def traceable(module: nn.Module, attention: str = "") -> nn.Module:
    """A shallow copy that shares everything with the module, but whose attention's config names the traced function.

    Args:
        module: An attention module, or a layer that holds one.
        attention: Path of the attention module in it.
    """
    view = object.__new__(host_class(module))
    view.__dict__ = {**module.__dict__, "gradient_checkpointing": False}
    if attention:
        child, _, rest = attention.partition(".")
        view.__dict__["_modules"] = {**module._modules, child: traceable(module.get_submodule(child), rest)}
    else:
        view.__dict__["config"] = SimpleNamespace(_attn_implementation=_TRACED)
    return view


def check_attends(layer: nn.Module, name: str, trace: TraceSpec) -> None:
    """
    Args:
        layer: To be patched.
        name: Fully qualified, for errors.
        trace: How it is to be traced.

    Raises:
        UnsupportedModelError: If it holds no attention module that calls the interface.
    """
    cores = attention_cores(layer, trace)
    if not cores:
        raise UnsupportedModelError(
            f"{name} ({type(layer).__name__}) holds no attention module that calls transformers' attention "
            "interface: expected one. Leave the model unpatched, or register an adapter for it"
        )
    eager_function(layer.get_submodule(cores[-1]))


class TappedInterface(TappedAttention):
    """Mixin of a patched attention module: its generated code hands over what the interface takes."""

    def _evo_hand(self, tap: AttentionTap, others: dict[str, Any]) -> Any:
        # The attention mask is None, as the layer has checked; the rest is for the implementation.
        kwargs = {name: value for name, value in others.items() if name != "attention_mask"}
        return self._evo_interface(tap, kwargs)

    def _evo_interface(self, tap: AttentionTap, kwargs: dict[str, Any]) -> Interface:
        """What the generated code calls, with keyword arguments for the implementation."""
        return Interface(self, tap, kwargs)

    @staticmethod
    def _evo_traceable(attention: nn.Module) -> nn.Module:
        return traceable(attention)


def eager_function(attention: nn.Module) -> Callable[..., Any]:
    """The eager attention of the module that defines an attention class, or the class that it is derived from."""
    for cls in host_class(attention).__mro__:
        function: Callable[..., Any] | None = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise AttentionNotFoundError(
        f"{type(attention).__name__} ({type(attention).__module__}): expected an eager_attention_forward where the "
        "class or one of its bases is defined, as in transformers"
    )


class Interface:
    """What the generated code of an attention module calls, for one call."""

    def __init__(self, module: Any, tap: AttentionTap, kwargs: dict[str, Any]) -> None:
        self._module = module
        self._tap = tap
        self._kwargs = kwargs

    def asking(self, query: Tensor) -> Tensor:
        """See `AttentionTap`."""
        return self._tap.asking(query)

    def interface(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own implementation on the compact set; attention weights, if asked for, between all tokens."""
        module = self._module
        bias = self._prepared(query, key, attention_mask, kwargs.get("scaling"))
        implementation = module.config._attn_implementation
        if bias is not None and (implementation.startswith(_TAKE_NO_BIAS) or _FROM_A_HUB in implementation):
            implementation = "sdpa"
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_function(module))
        output, weights = function(module, query, key, value, bias, **kwargs, **self._kwargs)
        partition = self._tap.partition
        if weights is None or partition is None:
            return output, weights
        wanted = self._weights_wanted() or self._tap.full_grid is not None
        return output, spread_attention(weights, self._shown(partition)) if wanted else None

    def _shown(self, partition: Partition) -> Partition:
        """The partition by the tokens that attention weights are between."""
        return partition.shown(self._tap.behind)

    def _prepared(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor | None:
        """See `AttentionTap.prepare`."""
        return self._tap.prepare(query, key, mask, scale)

    def _weights_wanted(self) -> bool:
        asked = self._kwargs.get("output_attentions", getattr(self._module.config, "output_attentions", False))
        return bool(asked) or is_recorded("attentions")
