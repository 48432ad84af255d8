"""What the code of a forward asserts: its patched one asserts it, too."""

from __future__ import annotations

import ast
import linecache
import operator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx


@fx.node.has_side_effect
def asserted(condition: Any, message: str) -> None:
    """Stands in a graph for an `assert`."""
    if isinstance(condition, Tensor) and torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    else:
        torch._assert(condition, message)


def record(condition: fx.Proxy, frame: FrameType) -> bool | None:
    """Record an `assert`, if a frame takes the truth of something for one.

    Returns:
        What is true of the condition; None where it is for anything else, or the source can't be had.
    """
    found = _assert_at(frame)
    if found is None:
        return None
    negated = isinstance(found.test, ast.UnaryOp)
    if negated:
        condition = condition.tracer.create_proxy("call_function", operator.not_, (condition,), {})
    condition.tracer.create_proxy("call_function", asserted, (condition, ast.unparse(found)), {})
    return not negated


def _assert_at(frame: FrameType) -> ast.Assert | None:
    """The only statement of its lines, in which all that is taken for true has to be."""
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except SyntaxError:
        return None
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    for found in statements:
        lines = range(found.lineno, (found.end_lineno or found.lineno) + 1)
        if isinstance(found, ast.Assert) and frame.f_lineno in lines:
            alone = all(each is found or each.lineno not in lines for each in statements)
            return found if alone and _needs_all(found.test) else None
    return None


def _needs_all(test: ast.expr) -> bool:
    """Whether an expression is true if and only if each part is whose truth is asked for; of `not`, none is."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _is_one(test.operand)
    if isinstance(test, ast.BoolOp):
        return isinstance(test.op, ast.And) and all(map(_is_one, test.values))
    return _is_one(test)


def _is_one(test: ast.expr) -> bool:
    if any(isinstance(node, (ast.IfExp, ast.BoolOp, ast.comprehension, ast.Lambda)) for node in ast.walk(test)):
        return False
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and not isinstance(test.ops[0], (ast.In, ast.NotIn))
    method = isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute)
    return method or isinstance(test, (ast.Attribute, ast.Name, ast.Subscript))


def without_asserts(graph: fx.Graph) -> None:
    """Of a graph for something else than the forward itself, whose tensors are other ones."""
    for node in [node for node in graph.nodes if node.target is asserted]:
        graph.erase_node(node)
