"""Factors in a graph that are the same for all tokens: numbers, sizes of channels, what a module has learned."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .constants import constant_of

CASTS = {"float", "half", "bfloat16", "double", "to", "type", "type_as", "contiguous", "clone"}
"""Methods that change how values are held, not what they are."""


@dataclass(frozen=True)
class Sizes:
    """Those that don't change with the number of tokens."""

    by_head: frozenset[fx.Node] = frozenset()
    """Tensors whose last axis are the channels of one head."""
    head: int | None = 64
    """So many, where they are known: which factors there are doesn't depend on it, only how large they are."""
    channels: int | None = 768
    """Of the tokens that the graph's `x` are, likewise."""

    def asked(self, node: fx.Node) -> int | None:
        """What a node asks for: `t.size(-1)`, `t.shape[-1]`, or the third of `x`, which has three; else None."""
        if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
            tensor, axis = node.args
        elif node.op == "call_function" and node.target is operator.getitem:
            shape, axis = node.args
            if not (isinstance(shape, fx.Node) and shape.target is getattr and shape.args[1] == "shape"):
                return None
            tensor = shape.args[0]
        else:
            return None
        assert isinstance(tensor, fx.Node)
        if tensor.op == "placeholder" and tensor.target == "x":
            return self.channels if axis in (-1, 2) else None
        return self.head if axis == -1 and tensor in self.by_head else None


def factor_of(value: Any, module: Any, sizes: Sizes) -> float | Tensor | None:
    """A factor that is the same for all tokens.

    Args:
        value: A number, or a node of the graph.
        module: That the graph is of.
        sizes: What the sizes in the graph are.

    Returns:
        A number; a tensor, as it is now, of something learned, such as a temperature by head `(H, 1, 1)`; None for
        anything else.
    """
    try:
        with torch.no_grad():
            found = _value(value, module, sizes)
    except Exception:  # whatever it is that computes the value can't be run without tokens
        return None
    if isinstance(found, Tensor):
        return found if all(size == 1 for size in found.shape[-2:]) else None
    return float(found) if isinstance(found, (int, float)) else None


def _value(value: Any, module: Any, sizes: Sizes) -> Any:
    if not isinstance(value, fx.Node):
        return value
    size = sizes.asked(value)
    if size is not None:
        return size
    if value.op == "get_attr":
        return operator.attrgetter(str(value.target))(module)
    if value.op == "call_function" and (constant := constant_of(value)) is not None:
        return constant.item() if constant.numel() == 1 else constant
    if value.op == "call_method" and value.target in CASTS:
        return _value(value.args[0], module, sizes)
    name = getattr(value.target, "__name__", str(value.target))
    if value.op not in ("call_function", "call_method") or name.endswith("_"):
        raise ValueError(f"'{value}' needs tokens, or changes what the module holds")
    args = [fx.node.map_arg(each, lambda node: _value(node, module, sizes)) for each in value.args]
    kwargs = {
        key: fx.node.map_arg(each, lambda node: _value(node, module, sizes)) for key, each in value.kwargs.items()
    }
    target: Any = getattr(args.pop(0), name) if value.op == "call_method" else value.target
    return target(*args, **kwargs)
