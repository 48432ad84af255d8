"""Factors in a graph that are the same for all tokens: numbers, sizes of channels, what a module has learned."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .constants import constant_of
from .products import CASTS


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
        return self.head if axis in (-1, 3) and tensor in self.by_head else None


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
    computing = _Computing(module, sizes)
    try:
        with torch.no_grad():
            found = computing.value(value)
    except Exception:  # whatever it is that computes the value can't be run without tokens
        return None
    if isinstance(found, (int, float)) and computing.learned:
        found = torch.tensor(float(found))  # as by `item()`: it may change
    if isinstance(found, Tensor):
        return found if all(size == 1 for size in found.shape[-2:]) else None
    return float(found) if isinstance(found, (int, float)) else None


class _Computing:
    """What a graph computes of sizes, and of what its module holds."""

    def __init__(self, module: Any, sizes: Sizes) -> None:
        self._module, self._sizes = module, sizes
        self.learned = False
        """Whether it looked at what the module holds."""

    def value(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        size = self._sizes.asked(value)
        if size is not None:
            return size
        if value.op == "get_attr":
            self.learned = True
            return operator.attrgetter(str(value.target))(self._module)
        if value.op == "call_function" and (constant := constant_of(value)) is not None:
            return constant.item() if constant.numel() == 1 else constant
        if value.op == "call_method" and value.target in CASTS:
            return self.value(value.args[0])
        name = getattr(value.target, "__name__", str(value.target))
        if value.op not in ("call_function", "call_method") or name.endswith("_"):
            raise ValueError(f"'{value}' needs tokens, or changes what the module holds")
        args = [fx.node.map_arg(each, self.value) for each in value.args]
        kwargs = {key: fx.node.map_arg(each, self.value) for key, each in value.kwargs.items()}
        target: Any = getattr(args.pop(0), name) if value.op == "call_method" else value.target
        return target(*args, **kwargs)
