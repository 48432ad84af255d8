"""Encoders of transformers that call their layers with the tokens alone, or little else: they run on a view.

An encoder's class may be swapped, as transformers finds by the class of a whole model, and of a layer, what to record.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from evopatch.errors import UnsupportedModelError
from evopatch.forward.block import SlowFastBlock
from evopatch.forward.host_state import HostState
from evopatch.forward.walk import PatchedHost, walk
from evopatch.patching.adapter import Change, block_changes, named_blocks, passages

from . import interface
from .own_attention import OwnAttention, check_fused
from .passing import passes_keywords
from .recording import is_looked_between


class SlowFastEncoder(PatchedHost):
    """Mixin of a patched encoder that runs on a view."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own, on slow-fast layers."""
        host: Any = self
        layers = host.get_submodule(str(self._evo_state.spec.blocks))
        return walk(self, "forward", *args, compact=not is_looked_between(host, layers, kwargs), **kwargs)


class ViewedLayer(SlowFastBlock):
    """Mixin of a patched layer of such an encoder."""

    @staticmethod
    def _evo_traceable(block: nn.Module, cores: tuple[str, ...]) -> nn.Module:
        return interface.traceable(block, cores[-1])


def runs_on_view(host: nn.Module, name: str) -> bool:
    """Whether a host doesn't pass keyword arguments on to its layers, in which the state could travel.

    Args:
        host: Loops over its layers.
        name: Fully qualified, for errors.

    Raises:
        UnsupportedModelError: If it doesn't, and is a whole model, whose class has to stay.
    """
    cls = type(host)
    parameters = inspect.signature(cls.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) and passes_keywords(cls):
        return False
    if isinstance(host, PreTrainedModel):
        raise UnsupportedModelError(
            f"'{name or 'model'}' ({cls.__module__}.{cls.__qualname__}) doesn't pass its **kwargs on to its layers in "
            f"transformers {transformers.__version__}: expected it to take and pass them, since the state of a forward "
            "pass travels in them. Use a newer version of transformers, or pass **kwargs on"
        )
    return True


def plan(host: nn.Module, state: HostState, own_attention: bool) -> list[Change]:
    """Every change to a host, its layers and their attention modules.

    Args:
        host: Loops over its layers.
        state: Its.
        own_attention: Its attention modules don't call transformers' interface.

    Raises:
        UnsupportedModelError: If a layer can't be patched; names it.
    """
    changes = [Change(host, SlowFastEncoder, {"_evo_state": state}), *passages(host, state.index_of)]
    for name, layer in named_blocks(host, state):
        if own_attention:
            check_fused(layer, name, state.spec.trace)
            changes += block_changes(layer, name, state, SlowFastBlock, OwnAttention)
        else:
            interface.check_attends(layer, name, state.spec.trace)
            changes += block_changes(layer, name, state, ViewedLayer, interface.TappedInterface)
    return changes
