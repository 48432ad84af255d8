"""ViT, DeiT, DINOv2 and the other flat vision transformers of transformers that share their layer's shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from evopatch.errors import UnsupportedInputError
from evopatch.forward.host_state import HostState
from evopatch.forward.spec import Block
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks
from evopatch.rewrite.tracing import TraceSpec

from . import heads, layer, refusals, viewed
from .families import FAMILIES, Family, function_of, loaded, row_of
from .interface import CORE_NAMES, CORES, TappedInterface, check_attends
from .own_attention import OwnAttention, OwnLayer
from .rotated import PlacedInterface, RotatedInterface


class ViTAdapter(Adapter):
    """The modules that loop over the layers; every head and every model that holds one is served through them."""

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return tuple(loaded(FAMILIES))

    def inspect(self, host: Any, name: str) -> HostSpec:
        family = row_of(host, FAMILIES)
        tables = ("position_embeddings",) if family.rotary else ()
        biases = family.biases(host.config)
        trace = TraceSpec(
            (*tables, *biases),
            absent=() if biases else ("attention_mask",),
            leaf_functions=(function_of(host, family.rotates),) if _rotates(family) else (),
            replaced=_replaced(host, family),
            aside=family.aside,
        )
        if not family.own_attention:
            trace = dataclasses.replace(trace, core_names=CORE_NAMES, cores=CORES)
        joined, behind = family.joined(host.config), family.behind(host.config)
        readout = 0 if family.mean else behind or family.readout(host.config)
        return HostSpec(
            _first(host, family.blocks, joined) if joined else family.blocks,
            family.prefix(host.config) + behind,
            readout,
            head_reads=0 if joined or behind or family.appended else readout,
            behind=behind,
            pooled=family.pooled,
            appended=family.appended.rows if family.appended else 0,
            joined=family.windows.windows(host.config) if family.windows else 1,
            trace=trace,
            token_inputs=tables,
            mask="" if biases or behind or family.appended else "attention_mask",
            pads=family.pads,
        )

    def why_not(self, module: nn.Module) -> str:
        return refusals.why_not(module)

    def plan_holder(self, holder: nn.Module, host: nn.Module) -> list[Change]:
        return heads.plan(holder, host)

    def plan(self, host: nn.Module, state: HostState) -> list[Change]:
        family = row_of(host, FAMILIES)
        if viewed.runs_on_view(host):
            return viewed.plan(host, state, family)
        if family.own_attention:
            return layer.plan(host, state, OwnLayer, lambda layer: OwnAttention)
        for name, each in named_blocks(host, state):
            check_attends(each, name, state.spec.trace)
        return layer.plan(host, state, layer.SlowFastLayer, partial(_attention_of, family))

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        if reason := row_of(host, FAMILIES).no_grid:
            raise UnsupportedInputError(f"{type(host).__name__} {reason}")
        return layer.grid_of(host.config, image_size)


def _first(host: nn.Module, container: str, others: int) -> tuple[tuple[Block, ...], ...]:
    """All layers but the last `others`, as one stage."""
    names = [name for name, _ in host.get_submodule(container).named_children()]
    return (tuple((f"{container}.{name}",) for name in names[: len(names) - others]),)


def _attention_of(family: Family, layer: nn.Module) -> type[TappedInterface]:
    """The mixin for a layer's attention module."""
    if family.windows is not None and family.windows.joins(layer):
        return family.windows
    if family.appended is not None:
        return family.appended
    return RotatedInterface if family.rotation else PlacedInterface if family.places else TappedInterface


def _rotates(family: Family) -> bool:
    """Whether queries and keys are rotated by the model's function as it stands."""
    return bool(family.places) or (family.rotary and not family.rotation)


def _replaced(host: nn.Module, family: Family) -> dict[Callable[..., Any] | str, str]:
    """See `TraceSpec.replaced`."""
    if family.places:
        return {family.places: "places"}
    return {function_of(host, family.rotation): "rotate"} if family.rotation else {}
