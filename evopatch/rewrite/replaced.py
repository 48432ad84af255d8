"""Calls in a graph that make something by token that a compact set needs its own of, handed to the tap."""

from __future__ import annotations

import operator

import torch
from torch import fx

from .tracing import TraceSpec

_ADDITIONS = {operator.add, torch.add}
_SHAPES = {"reshape", "reshape_as", "view", "view_as"}


def replace_calls(graph: fx.Graph, evo: fx.Node, spec: TraceSpec) -> None:
    """Let `evo` make what the functions and methods named in `TraceSpec.replaced` would.

    Args:
        graph: Changed in place.
        evo: The node of the tap.
        spec: What the adapter knows about the module.
    """
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in spec.replaced:
            continue
        args = node.args[1:] if node.op == "call_method" else node.args  # without the module
        with graph.inserting_before(node):
            tapped = graph.call_method(spec.replaced[node.target], (evo, *args), dict(node.kwargs))
        node.replace_all_uses_with(tapped)
        graph.erase_node(node)


def adds_replaced(node: fx.Node, spec: TraceSpec) -> bool:
    """Whether a node adds such a bias to the logits that are its first argument, or is handed them to do so."""
    methods = set(spec.replaced.values())
    if node.op == "call_method":
        return node.target in methods
    bias = node.args[1] if node.op == "call_function" and node.target in _ADDITIONS else None
    while isinstance(bias, fx.Node) and bias.op == "call_method" and bias.target in _SHAPES:
        bias = bias.args[0]
    return isinstance(bias, fx.Node) and bias.target in methods
