"""The linear layers that an attention module makes its queries and keys with, found in its graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .readout import is_plain


@dataclass(frozen=True)
class Projection:
    """One of the equal parts of a linear layer's outputs."""

    path: str
    """Of the layer in the attention module."""
    part: int
    parts: int


@dataclass(frozen=True)
class Projections:
    """Of queries and keys that meet in the attention core as they are projected: neither normalised nor rotated, and
    without a bias by their places."""

    query: Projection
    key: Projection
    heads: int
    scale: float | None
    """Factor on the logits; None: `D ** -0.5`."""


def find_projections(graph: fx.Graph, module: nn.Module, methods: Collection[str]) -> Projections | None:
    """None unless the module has one core, whose queries and keys come from linear layers by a change of layout alone.

    Args:
        graph: A tapped one.
        module: Its own.
        methods: Names of the calls that take query, key and value.
    """
    cores = [node for node in graph.nodes if node.op == "call_method" and node.target in methods]
    if len(cores) != 1 or len(cores[0].args) < 3:
        return None
    _, query, key, *others = cores[0].args
    named = cores[0].kwargs
    found = [_projection(node, module) for node in (query, key)]
    if any(isinstance(value, fx.Node) for value in (*others[1:], named.get("attn_mask"))) or None in found:
        return None
    (query_projection, heads), (key_projection, key_heads) = found  # type: ignore[misc]
    scale: Any = named.get("scale", named.get("scaling"))
    return Projections(query_projection, key_projection, heads, scale) if heads == key_heads else None


def _projection(node: Any, module: nn.Module) -> tuple[Projection, int] | None:
    """What a query or key comes from, and its number of heads.

    By `linear -> view(B, N, H, D) -> transpose(1, 2)`, or
    `linear -> reshape(B, N, 3, H, D) -> permute(2, 0, 3, 1, 4) -> unbind(0)`.
    """
    while _is(node, "call_module") and type(module.get_submodule(node.target)) is nn.Identity:
        node = node.args[0]
    part, parts, layout = 0, 1, node
    if _is(node, "call_function", operator.getitem) and _is(node.args[0], "call_method", "unbind"):
        part, parts, layout = node.args[1], 3, node.args[0].args[0]
        order = ("permute", (2, 0, 3, 1, 4))
        if node.args[0].args[1:] not in ((), (0,)):
            return None
    else:
        order = ("transpose", (1, 2))
    if not _is(layout, "call_method", order[0]) or layout.args[1:] != order[1]:
        return None
    shaped = layout.args[0]
    if not (_is(shaped, "call_method", "view") or _is(shaped, "call_method", "reshape")):
        return None
    shape = shaped.args[1] if isinstance(shaped.args[1], tuple) else shaped.args[1:]
    linear, (heads, channels) = shaped.args[0], shape[-2:]
    if (parts > 1 and shape[2:3] != (parts,)) or len(shape) != (5 if parts > 1 else 4):
        return None
    if not _is(linear, "call_module") or not _is(linear.args[0], "placeholder"):
        return None
    if not isinstance(heads, int) or not isinstance(channels, int):
        return None
    layer: Any = module.get_submodule(linear.target)
    features = getattr(layer, "out_features", 0) // parts
    return Projection(linear.target, part, parts), heads if heads != -1 else features // channels


def _is(node: Any, op: str, target: str | Callable[..., Any] | None = None) -> bool:
    return isinstance(node, fx.Node) and node.op == op and target in (None, node.target)


def weight_of(module: Any, projection: Projection, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight `(D, C)` and bias of a projection without a gradient, where and of what type `like` is.

    Returns:
        None where they aren't there: of layers that are no plain linear ones, and of offloaded ones.
    """
    linear: Any = module.get_submodule(projection.path)
    if not is_plain(linear) or linear.weight.device == torch.device("meta") != like.device:
        return None
    size = linear.out_features // projection.parts
    rows = slice(projection.part * size, (projection.part + 1) * size)
    bias = None if linear.bias is None else linear.bias.detach()[rows].to(like)
    return linear.weight.detach()[rows].to(like), bias
