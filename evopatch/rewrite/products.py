"""Products of queries and keys, or of weights and values, in a graph."""

from __future__ import annotations

import operator
from collections import deque
from typing import Any

import torch
from torch import fx

_PRODUCTS = {torch.matmul, operator.matmul, torch.bmm, torch.einsum, "matmul", "bmm", "__matmul__"}
_TRANSPOSITIONS = {"transpose", "permute", "swapaxes"}
_TRANSPOSED = {"mT", "T", "mH"}
SCALINGS: dict[Any, int] = {
    operator.mul: 1, torch.mul: 1, torch.multiply: 1, "mul": 1, "mul_": 1, "multiply": 1,
    operator.truediv: -1, torch.div: -1, torch.divide: -1, "div": -1, "div_": -1, "divide": -1,
}  # fmt: skip
"""By what multiplies and divides: the power of the factor."""
CASTS = {"float", "half", "bfloat16", "double", "to", "type", "type_as", "contiguous", "clone", "detach"}
"""Methods that change how values are held, not what they are."""


def product_of(node: Any) -> tuple[Any, Any] | None:
    """What a node multiplies, such as queries and keys, these transposed or not; None where it isn't a product."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target not in _PRODUCTS and not _is_einops(node.target):
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
    found: set[fx.Node] = set()
    for node in (query, _untransposed(key)):
        while isinstance(node, fx.Node) and node not in found and node.op != "get_attr":
            found.add(node)
            # What is before anything else may have other axes.
            node = node.args[0] if node.target in SCALINGS or node.target in CASTS else None
    return frozenset(found)


def _untransposed(key: Any) -> Any:
    if not isinstance(key, fx.Node):
        return key
    attribute = key.op == "call_function" and key.target is getattr and key.args[1] in _TRANSPOSED
    return key.args[0] if attribute or (key.op == "call_method" and key.target in _TRANSPOSITIONS) else key


def _is_einops(target: Any) -> bool:
    return getattr(target, "__name__", "") == "einsum" and str(getattr(target, "__module__", "")).startswith("einops")


def nearest_product(node: fx.Node) -> tuple[Any, Any] | None:
    """What is multiplied in the nearest product that a node is made of, or is; None where there is none."""
    queue, seen = deque([node]), {node}
    while queue:
        node = queue.popleft()
        if (product := product_of(node)) is not None:
            return product
        new = [each for each in node.all_input_nodes if each not in seen]
        seen.update(new)
        queue += new
    return None
