"""Encoders of transformers that call their layers with the tokens alone, or little else: they run on a view.

Their classes are swapped under the same names, by which transformers finds what a model records.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from evopatch.forward.block import SlowFastBlock
from evopatch.forward.host_state import HostState
from evopatch.forward.walk import PatchedHost, walk
from evopatch.patching.adapter import Change, block_changes, named_blocks, passages

from . import heads, interface
from .families import Family
from .own_attention import OwnAttention, check_fused
from .passing import passes_keywords
from .recording import is_looked_between


class SlowFastEncoder(PatchedHost):
    """Mixin of a patched encoder that runs on a view."""

    _evo_keeps_name = True
    _evo_looks: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own, on slow-fast layers."""
        host: Any = self
        layers = [host.get_submodule(path) for (path,) in self._evo_state.blocks]
        reads_prefix = heads.nobody_looks(host, kwargs)
        compact = not self._evo_looks and not is_looked_between(host, layers, kwargs)
        return walk(self, "forward", *args, compact=compact, reads_prefix=reads_prefix, **kwargs)


class ViewedLayer(SlowFastBlock):
    """Mixin of a patched layer of such an encoder."""

    @staticmethod
    def _evo_traceable(block: nn.Module, cores: tuple[str, ...]) -> nn.Module:
        return interface.traceable(block, cores[-1])


def runs_on_view(host: nn.Module) -> bool:
    """Whether a host doesn't pass keyword arguments on to its layers, in which the state could travel."""
    cls = type(host)
    parameters = inspect.signature(cls.forward).parameters.values()
    return not (any(p.kind is p.VAR_KEYWORD for p in parameters) and passes_keywords(cls))


def plan(host: Any, state: HostState, family: Family) -> list[Change]:
    """Every change to a host, its layers and their attention modules.

    Args:
        host: Loops over its layers.
        state: Its.
        family: Its.

    Raises:
        UnsupportedModelError: If a layer can't be patched; names it.
    """
    attributes = {"_evo_state": state, "_evo_looks": family.looks(host.config)}
    changes = [Change(host, SlowFastEncoder, attributes), *passages(host, state.index_of)]
    for name, layer in named_blocks(host, state):
        if family.own_attention:
            if family.biases(host.config):
                check_fused(layer, name, state.spec.trace)
            changes += block_changes(layer, name, state, SlowFastBlock, OwnAttention)
        else:
            interface.check_attends(layer, name, state.spec.trace)
            changes += block_changes(layer, name, state, ViewedLayer, interface.TappedInterface)
    return changes
