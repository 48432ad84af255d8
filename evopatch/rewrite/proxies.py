"""What stands for a tensor while a forward is recorded: it knows a little more than those of torch.fx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx


def proxy_of(node: fx.Node, tracer: fx.Tracer) -> fx.Proxy:
    """What stands for what a node gives."""
    parts = _number_of_parts(node)
    return _Proxy(node, tracer) if parts is None else _Parts(node, tracer, parts)


class _Proxy(fx.Proxy):
    def __getattr__(self, name: str) -> Any:
        kind = {"shape": _Shape, "size": _Size}.get(name)
        return super().__getattr__(name) if kind is None else kind(self, name)


class _Parts(_Proxy):
    """Of `x.chunk(3)`: fx knows how many there are only where they are unpacked, not in a loop over them."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, parts: int) -> None:
        super().__init__(node, tracer)
        self._parts = parts

    def __iter__(self) -> Iterator[Any]:
        whole: Any = self
        return (whole[index] for index in range(self._parts))


def _number_of_parts(node: fx.Node) -> int | None:
    """Of what `chunk`, `split` or `unbind` gives; None for anything else, and where the graph doesn't say."""
    if node.op != "call_method":
        return None
    given = (*node.args[1:], *node.kwargs.values())
    if node.target == "chunk" and given and isinstance(given[0], int):
        return given[0]
    if node.target == "split" and given and isinstance(given[0], (tuple, list)):
        return len(given[0])
    return _size_of(node.args[0], given[0] if given else 0) if node.target == "unbind" else None


def _size_of(node: Any, axis: Any) -> int | None:
    """Of one axis of what a change of layout gives."""
    sizes = tuple(node.args[1:])
    if isinstance(sizes[0] if sizes else None, (tuple, list)):
        sizes = tuple(sizes[0])
    if node.op != "call_method" or not isinstance(axis, int):
        return None
    if node.target == "permute" and axis < len(sizes):
        return _size_of(node.args[0], sizes[axis])
    if node.target == "unflatten" and len(node.args) == 3 and node.args[1] in (-1, 2):
        sizes = (None, None, *node.args[2])  # of tokens
    elif node.target not in ("view", "reshape"):
        return None
    size = sizes[axis] if axis < len(sizes) else None
    return size if isinstance(size, int) and size > 0 else None


class _Shape(fx.proxy.Attribute):
    def __getitem__(self, key: Any) -> Any:
        # `*x.shape[:-1]`: fx can't tell how many it unpacks. Tokens are (B, M, C), or (B, M, H, D) by head, so two.
        if key in (slice(None, -1), slice(None, -2)):
            return self[0], self[1]
        return super().__getitem__(key)  # type: ignore[misc]

    def __ne__(self, other: Any) -> Any:
        # `if weights.size() != (...): raise`: a module's check of its own shapes.
        return False if isinstance(other, tuple) else super().__ne__(other)

    __hash__ = fx.Proxy.__hash__


class _Size(fx.proxy.Attribute):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) if args or kwargs else _Shape(self.root, "shape")
