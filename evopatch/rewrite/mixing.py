"""Layers that mix attention heads after the softmax, in a graph: what they add to a key counts once per token of it.

A layer with a bias makes `W a + b` of the weights `a` that the heads give to a token, and a group of `n` equal tokens
has `n` times that. So the weights of a group are shared among its tokens, and its values count `n` times.
"""

from __future__ import annotations

from torch import fx, nn

from ..errors import AttentionNotFoundError
from .products import product_of
from .tracing import TraceSpec


def mixes_heads(node: fx.Node, spec: TraceSpec) -> bool:
    """Whether a node is such a layer, or moves the heads to the last axis or back for it."""
    if node.op == "call_module":
        return str(node.target).rpartition(".")[2] in spec.mixing
    return bool(spec.mixing) and node.op == "call_method" and node.target == "permute"


def count_values(softmax: fx.Node, evo: fx.Node, block: nn.Module, name: str) -> None:
    """Let the values that a softmax's weights are multiplied by count by the sizes of their groups.

    Args:
        softmax: What comes out of it goes to nothing but their product, by other nodes.
        evo: The node of the tap.
        block: The module that the graph is of.
        name: Its fully qualified name, for errors.

    Raises:
        AttentionNotFoundError: If there is no such product.
    """
    node = softmax
    while len(node.users) == 1:
        before, node = node, next(iter(node.users))
        product = product_of(node)
        if product is not None and product[0] is before:
            with node.graph.inserting_before(node):
                counted = node.graph.call_method("counted", (evo, product[1]))
            node.replace_input_with(product[1], counted)
            return
    raise AttentionNotFoundError(
        f"{name} ({type(block).__name__}): found no product of what comes out of the softmax '{softmax}' and values, "
        f"but '{node}' ({node.op} {node.target}); expected one. Leave the model unpatched"
    )
