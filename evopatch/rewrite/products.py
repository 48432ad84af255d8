"""Products of queries and keys, or of weights and values, in a graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

_PRODUCTS = {torch.matmul, operator.matmul, torch.bmm, torch.einsum, "matmul", "bmm", "__matmul__"}
_TRANSPOSITIONS = {"transpose", "permute", "swapaxes", "mT"}
_LAYOUTS = {"view", "reshape", "unflatten", *_TRANSPOSITIONS}


def product_of(node: Any) -> tuple[Any, Any] | None:
    """What a node multiplies, such as queries and keys, these transposed or not; None where it isn't a product."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target not in _PRODUCTS:
        return None
    factors: Any = node.args[1:] if node.target is torch.einsum else node.args
    if len(factors) == 1 and isinstance(factors[0], (list, tuple)):  # einsum's former way
        factors = factors[0]
    return (factors[0], factors[1]) if len(factors) > 1 else None


def by_head(query: Any, key: Any) -> frozenset[fx.Node]:
    """Tensors on the way to a product whose last axis are the channels of one head.

    Args:
        query: As it is multiplied.
        key: Likewise, maybe transposed.
    """
    if isinstance(key, fx.Node) and key.op == "call_method" and key.target in _TRANSPOSITIONS:
        key = key.args[0]
    found = set()
    for node in (query, key):
        # By what changes single numbers, to the first change of layout, which is `(..., D)` behind it.
        while isinstance(node, fx.Node) and node not in found:
            found.add(node)
            layout = node.op == "call_method" and node.target in _LAYOUTS
            node = None if layout or node.op == "placeholder" else next(iter(node.all_input_nodes), None)
    return frozenset(found)


def made_of(node: fx.Node) -> Iterator[fx.Node]:
    """A node and those before it, the nearest first."""
    queue, seen = [node], {node}
    while queue:
        node = queue.pop(0)
        yield node
        new = [each for each in node.all_input_nodes if each not in seen]
        seen.update(new)
        queue += new
