"""What stands for a tensor while a forward is recorded: it knows a little more than those of torch.fx."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_PARTING: dict[Any, str] = {torch.chunk: "chunk", torch.split: "split", torch.unbind: "unbind"}
_GIVEN = {"chunk": "chunks", "split": "split_size", "unbind": "dim"}
"""By what gives several parts, what is said first of them."""


class Proxy(fx.Proxy):
    """Of any tensor."""

    def __getattr__(self, name: str) -> Any:
        kind = {"shape": Shape, "size": _Size}.get(name)
        return super().__getattr__(name) if kind is None else kind(self, name)


def number_of_parts(node: fx.Node) -> int | None:
    """Of what `chunk`, `split` or `unbind` gives, where nothing unpacks it; None for anything else, and where the graph
    doesn't say."""
    called = _PARTING.get(node.target, str(node.target))
    if node.op not in ("call_method", "call_function") or called not in _GIVEN:
        return None
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get(_GIVEN[called])
    if called == "chunk":
        return given if isinstance(given, int) else None
    if called == "split":
        return len(given) if isinstance(given, (tuple, list)) else None
    return _size_of(node.args[0], 0 if given is None else given)


def _size_of(node: Any, axis: Any) -> int | None:
    """Of one axis of what a change of layout gives."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or not isinstance(axis, int):
        return None
    sizes = tuple(node.args[1:])
    if sizes and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if node.target == "unflatten" and node.args[1:2] in ((-1,), (2,)) and len(node.args) == 3 and _is_projected(node):
        last: Any = node.args[2]
        sizes = (None, None, *last)
    elif node.target not in ("permute", "view", "reshape"):
        return None
    size = sizes[axis] if -len(sizes) <= axis < len(sizes) else None
    if node.target == "permute":
        return _size_of(node.args[0], size)
    return size if isinstance(size, int) and size > 0 else None


def _is_projected(node: fx.Node) -> bool:
    """Whether a layout is of what a module gives, tokens of three axes."""
    return isinstance(node.args[0], fx.Node) and node.args[0].op == "call_module"


class Shape(fx.proxy.Attribute):
    """Its sizes."""

    def __getitem__(self, key: Any) -> Any:
        # `*x.shape[:-1]`: fx can't tell how many it unpacks. Tokens are (B, M, C), or (B, M, H, D) by head, so two.
        if key in (slice(None, -1), slice(None, -2), slice(None, 2)):
            return self[0], self[1]
        return super().__getitem__(key)  # type: ignore[misc]

    def __len__(self) -> int:
        raise TypeError("how many axes a tensor has isn't known while it is traced")  # `[*x.shape]` goes on without

    def __ne__(self, other: Any) -> Any:
        # `if weights.size() != (...): raise`: a module's check of its own shapes.
        return False if isinstance(other, tuple) else super().__ne__(other)

    __hash__ = fx.Proxy.__hash__


class _Size(fx.proxy.Attribute):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) if args or kwargs else Shape(self.root, "shape")
