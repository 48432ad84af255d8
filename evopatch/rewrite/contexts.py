"""Contexts that a forward enters around a part of its code, which torch.fx doesn't record: `torch.autocast` and
`torch.no_grad`. Generated code enters them around each of the calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import fx

_NOTED = "evo_contexts"
_Autocast = tuple[str, bool, torch.dtype]
"""The type of devices that it is for, whether it is on, and what it casts to."""
_Contexts = tuple[bool, tuple[_Autocast, ...]]
"""Whether gradients are made, and the casts that were entered, the outermost first."""
_NONE: _Contexts = (True, ())
ONE_AT_A_TIME = threading.RLock()
"""What a trace changes outside of its module, it does alone."""


class Entered:
    """What a traced forward is inside of."""

    def __init__(self) -> None:
        self.casts: list[_Autocast] = []

    def note(self, node: fx.Node) -> None:
        contexts = torch.is_grad_enabled(), tuple(self.casts)
        if node.op.startswith("call_") and contexts != _NONE:
            node.meta[_NOTED] = contexts


@contextmanager
def noticed(entered: Entered) -> Iterator[None]:
    """For the length of a trace, in its thread; inside of `ONE_AT_A_TIME`."""
    cls: Any = torch.autocast
    enter, leave, thread = cls.__enter__, cls.__exit__, threading.get_ident()

    def entering(self: Any) -> Any:
        if threading.get_ident() == thread:
            entered.casts.append((self.device, self._enabled, self.fast_dtype))
        return enter(self)

    def leaving(self: Any, *raised: Any) -> Any:
        if threading.get_ident() == thread:
            entered.casts.pop()
        return leave(self, *raised)

    # Gradients are on, so that it shows where they are switched off.
    with torch.enable_grad():
        cls.__enter__, cls.__exit__ = entering, leaving
        try:
            yield
        finally:
            cls.__enter__, cls.__exit__ = enter, leave


def carry(old: fx.Node, new: fx.Node) -> fx.Node:
    """Let a node that takes another one's place be inside of the same contexts; returns it."""
    if _NOTED in old.meta:
        new.meta[_NOTED] = old.meta[_NOTED]
    return new


def entering(graph: fx.Graph) -> fx.Graph:
    """The same graph, or where calls in it are inside of contexts a copy that enters them."""
    if not any(_NOTED in node.meta for node in graph.nodes):
        return graph
    copy = fx.Graph(owning_module=graph.owning_module)
    output = copy.graph_copy(graph, {})
    copy.output(output)
    for node in [node for node in copy.nodes if _NOTED in node.meta]:
        with copy.inserting_before(node):
            given = (copy.get_attr(str(node.target)), *node.args) if node.op == "call_module" else node.args
            target = node.target if node.op == "call_function" else str(node.target)
            function = _within(node.meta[_NOTED], node.op, "" if node.op == "call_module" else target)
            node.replace_all_uses_with(copy.call_function(function, given, dict(node.kwargs)))
        copy.erase_node(node)
    return copy


@cache
def _within(contexts: _Contexts, op: str, target: Any) -> Callable[..., Any]:
    """What calls a function, a method by its name, or a module, inside of contexts."""
    grad, casts = contexts
    call = _calls(op, target)
    for each in reversed(casts):
        call = _under(call, *each)
    return call if grad else _without_gradients(call)


def _calls(op: str, target: Any) -> Callable[..., Any]:
    if op == "call_function":
        return cast(Callable[..., Any], target)
    if op == "call_module":
        return lambda module, *args, **kwargs: module(*args, **kwargs)
    return lambda x, *args, **kwargs: getattr(x, target)(*args, **kwargs)


def _under(call: Callable[..., Any], device: str, enabled: bool, dtype: torch.dtype) -> Callable[..., Any]:
    def within(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype, enabled):
            return call(*args, **kwargs)

    return within


def _without_gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    def within(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return call(*args, **kwargs)

    return within
