"""Which of a class's methods walk over a container of blocks, and whether they look at tokens in between.

By their source, as that is a question about what isn't called as much as about what is. Where the source can't be had,
or says anything else than the plain loop, whoever walks is taken to look.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable
from enum import IntEnum
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from .adding import adds_up
from .source import source_of


class Manner(IntEnum):
    """How a method walks."""

    PLAIN = 0
    """One block after the other, and nobody sees what one gives to the next."""
    CHECKPOINTED = 1
    """The same, or through a function that computes single blocks anew in backward."""
    LOOKING = 2
    """In any other way."""


def adds_parts(cls: type[nn.Module], container: str) -> bool:
    """Whether whoever walks over a container of lists of parts adds up what they give, as `adding.adds_up` says."""
    loops = [loop for functions in _methods(cls).values() for f in functions for loop in _loops(f, container)]
    return bool(loops) and all(adds_up(loop)[0] for loop in loops)


def hands_on(cls: type[nn.Module]) -> bool:
    """Whether the forward of a container's class does nothing but `for item in self: x = item(x)`."""
    function: Any = inspect.unwrap(cls.forward)
    tree = source_of(function)
    if tree is None or not isinstance(tree.body[0], ast.FunctionDef):
        return False
    own, *given = function.__code__.co_varnames[: function.__code__.co_argcount]
    statements = [s for s in tree.body[0].body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    if [type(statement) for statement in statements] != [ast.For, ast.Return]:
        return False
    loop, back = statements
    over_all = isinstance(loop, ast.For) and isinstance(loop.iter, ast.Name) and loop.iter.id == own
    gives = isinstance(back, ast.Return) and isinstance(back.value, ast.Name) and back.value.id in given[:1]
    return over_all and gives and isinstance(loop, ast.For) and _loop(loop) == Manner.PLAIN


def _loops(function: Callable[..., Any], container: str) -> list[ast.For]:
    """A function's loops that call what is in the container."""
    tree = source_of(inspect.unwrap(function))
    loops = [] if tree is None else [loop for loop in ast.walk(tree) if isinstance(loop, ast.For)]
    over = [loop for loop in loops if any(_is_mention(node, container) for node in ast.walk(loop.iter))]
    return [loop for loop in over if any(_calls(statement, _items(loop.target)) for statement in loop.body)]


def walkers(cls: type[nn.Module], container: str) -> dict[str, Manner]:
    """The methods of a class that call the blocks in a container, also by way of other methods.

    Args:
        cls: Of the module that holds the container.
        container: The attribute's name.
    """
    methods = _methods(cls)
    found: dict[str, Manner] = {}
    for name, functions in methods.items():
        manners = [manner for f in functions if (manner := _manner(f, container)) is not None]
        if manners:
            found[name] = max(manners)
    while True:
        reached = {
            name: max(found[called] for called in calls)
            for name, functions in methods.items()
            if name not in found and (calls := set().union(*(_names(f.__code__) for f in functions)) & found.keys())
        }
        if not reached:
            return found
        found |= reached


def _methods(cls: type[nn.Module]) -> dict[str, list[FunctionType]]:
    """By name, a class's methods, each with those of its bases that it calls: by `super()`, or by the base's name."""
    found: dict[str, list[FunctionType]] = {}
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and not name.startswith("__"):
                functions = found.setdefault(name, [])
                if not functions or {"super", base.__name__} & set(functions[-1].__code__.co_names):
                    functions.append(value)
    return found


def _names(code: CodeType) -> set[str]:
    """What a function's code names beside its own variables, inner functions included."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _manner(function: Callable[..., Any], container: str) -> Manner | None:
    """None for a function that doesn't call what is in the container."""
    unwrapped: Any = inspect.unwrap(function)
    code: CodeType = unwrapped.__code__
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    if container not in _names(code) | strings:
        return None
    tree = source_of(unwrapped)
    if tree is None:
        # Those that take nothing but themselves have no tokens to walk with.
        return Manner.LOOKING if code.co_argcount > 1 else None
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    mentions = [node for node in ast.walk(tree) if _is_mention(node, container)]
    manners = [manner for node in mentions if (manner := _use(node, parents)) is not None]
    return max(manners, default=None)


def _is_mention(node: ast.AST, container: str) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == container and isinstance(node.ctx, ast.Load)
    return isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == container


def _use(node: ast.AST, parents: dict[ast.AST, ast.AST], part: bool = False) -> Manner | None:
    """What one mention of the container is for.

    Args:
        node: It.
        parents: Of every node.
        part: It is one block or some, not all.
    """
    parent = parents[node]
    if isinstance(parent, ast.Call):
        return _use_in_call(node, parent, parents, part)
    if isinstance(parent, ast.For) and parent.iter is node:
        manner = _loop(parent)
        return Manner.LOOKING if part and manner is not None else manner
    if isinstance(parent, ast.comprehension):
        return Manner.LOOKING if _calls(parents[parent], _items(parent.target)) else None
    if isinstance(parent, ast.Subscript) and parent.value is node:
        return _use(parent, parents, part=True)
    if isinstance(parent, ast.Assign) and all(isinstance(target, ast.Name) for target in parent.targets):
        function = next(iter(parents.values()))
        names = set().union(*map(_items, parent.targets))
        return Manner.LOOKING if _calls(function, names) or _is_iterated(function, names) else None
    # What is left are attributes of it, and what is done to a container, not with its blocks.
    return None


def _use_in_call(node: ast.AST, call: ast.Call, parents: dict[ast.AST, ast.AST], part: bool) -> Manner | None:
    if call.func is node:
        return Manner.LOOKING if part else Manner.PLAIN
    if _is_harmless(call):
        return None
    if isinstance(call.func, ast.Name) and call.func.id == "enumerate":
        return _use(call, parents, part)
    return Manner.CHECKPOINTED if "checkpoint" in ast.unparse(call.func) and not part else Manner.LOOKING


def _is_harmless(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in ("len", "isinstance", "hasattr", "getattr", "range")


def _is_iterated(function: ast.AST, names: set[str]) -> bool:
    loops = (node for node in ast.walk(function) if isinstance(node, (ast.For, ast.comprehension)))
    return any(_items(loop.iter) & names for loop in loops)


def _items(target: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def _calls(node: ast.AST, items: set[str]) -> bool:
    """Whether any of these names is called in a piece of code, or given to a call."""
    calls = (call for call in ast.walk(node) if isinstance(call, ast.Call) and not _is_harmless(call))
    parts = (part for call in calls for part in (call.func, *call.args))
    return any(isinstance(part, ast.Name) and part.id in items for part in parts)


def _loop(loop: ast.For) -> Manner | None:
    items = _items(loop.target)
    if not any(_calls(statement, items) for statement in loop.body):
        return None
    if any(isinstance(node, (ast.Break, ast.Return)) for node in ast.walk(loop)):
        return Manner.LOOKING
    adds, looks = adds_up(loop)
    if adds:
        return Manner.LOOKING if looks else Manner.PLAIN
    steps: list[tuple[str, Manner]] = []
    others: list[ast.AST] = []
    _collect(loop.body, items, steps, others)
    tokens = {name for name, _ in steps}
    # An index may be used for anything; the block and the tokens for nothing else than its step.
    block = loop.target.elts[-1] if isinstance(loop.target, ast.Tuple) else loop.target
    looked_at = tokens | _items(block)
    if len(set().union(*_taken(loop.body, items))) != 1:
        return Manner.LOOKING  # a block may be left out
    if len(tokens) != 1 or loop.orelse or any(looked_at & _items(node) for node in others):
        return Manner.LOOKING
    return max(manner for _, manner in steps)


def _taken(statements: Iterable[ast.stmt], items: set[str]) -> tuple[set[int], set[int]]:
    """How many steps there may be until the statements end, and until they go on with the next block."""
    going, gone = {0}, set[int]()
    for statement in statements:
        if isinstance(statement, ast.Continue):
            return set(), gone | going
        if isinstance(statement, ast.If):
            branches = [_taken(branch, items) for branch in (statement.body, statement.orelse)]
            gone |= {count + more for count in going for _, left in branches for more in left}
            going = {count + more for count in going for left, _ in branches for more in left}
        elif _steps(statement, items):
            going = {count + 1 for count in going}
    return going, gone


def _collect(
    statements: Iterable[ast.stmt], items: set[str], steps: list[tuple[str, Manner]], others: list[ast.AST]
) -> None:
    """Sort a loop's statements into steps, `x = block(x, ...)`, and others.

    Of a block that gives a tuple, `x, weights = block(x)` and `x = block(x)[0]` are steps, too.
    """
    for statement in statements:
        found = _steps(statement, items)
        if found:
            steps += found
        elif isinstance(statement, ast.If):
            others.append(statement.test)
            _collect(statement.body, items, steps, others)
            _collect(statement.orelse, items, steps, others)
        else:
            others.append(statement)


def _steps(statement: ast.stmt, items: set[str]) -> list[tuple[str, Manner]]:
    """The name of the tokens in a step, and its manner; of one that is one thing or another, for each of the two."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return []
    target, value = statement.targets[0], statement.value
    if isinstance(target, ast.Tuple):
        target = target.elts[0]
    elif isinstance(value, ast.Subscript) and ast.unparse(value.slice) == "0":
        value = value.value
    if not isinstance(target, ast.Name) or (isinstance(value, ast.IfExp) and target.id in _items(value.test)):
        return []
    calls = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
    manners = [manner for call in calls if (manner := _called_with(call, target.id, items)) is not None]
    return [(target.id, manner) for manner in manners] if len(manners) == len(calls) else []


def _called_with(call: ast.expr, tokens: str, items: set[str]) -> Manner | None:
    """How a block is called with the tokens; None for anything else."""
    if not isinstance(call, ast.Call) or not call.args:
        return None
    manner, (first, *rest) = Manner.PLAIN, (call.func, *call.args)
    if "checkpoint" in ast.unparse(call.func):
        manner, (first, *rest) = Manner.CHECKPOINTED, call.args
    called = isinstance(first, ast.Name) and first.id in items
    given = bool(rest) and isinstance(rest[0], ast.Name) and rest[0].id == tokens
    again = any(tokens in _items(node) for node in (*rest[1:], *(word.value for word in call.keywords)))
    return manner if called and given and not again else None
