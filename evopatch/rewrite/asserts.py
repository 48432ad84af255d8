"""What the code of a forward asserts."""

from __future__ import annotations

import ast
import linecache
from types import FrameType

import torch
from torch import fx


def asserted_at(frame: FrameType) -> str | None:
    """The source of the `assert` that a frame is at; None where it is at none, or the source can't be had."""
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except SyntaxError:
        return None
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Assert))
    found = (each for each in statements if each.lineno <= frame.f_lineno <= (each.end_lineno or each.lineno))
    return next(map(ast.unparse, found), None)


def without_asserts(graph: fx.Graph) -> None:
    """Of a graph for something else than the forward itself, whose tensors are other ones."""
    for node in [node for node in graph.nodes if node.target is torch._assert]:
        graph.erase_node(node)
