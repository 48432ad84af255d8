"""What a module's method reads of the tokens that it is given."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

from torch import fx, nn

from .classes import host_class


class _Method(nn.Module):
    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self._name = name

    def forward(self, x: Any) -> Any:
        return getattr(host_class(self.module), self._name)(self.module, x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def rows_read(module: nn.Module, method: str) -> int:
    """How many of the first rows a method reads of the `(B, T, C)` tokens that it is given, if it reads no others.

    Args:
        module: Left as it is.
        method: Its name; called with the tokens alone.

    Returns:
        0 where it may read all rows, or torch.fx can't tell.
    """
    try:
        graph = _Tracer().trace(_Method(module, method))
    except Exception:  # whatever a method does that a trace can't follow
        return 0
    tokens = next(node for node in graph.nodes if node.op == "placeholder")
    rows = [_row(node) for node in tokens.users]
    return 0 if None in rows else max((row + 1 for row in rows if row is not None), default=0)


def _row(node: fx.Node) -> int | None:
    """Which one row a node takes: `x[:, i]`, `x[:, i, :]`."""
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or any(part != slice(None) for part in (index[0], *index[2:])):
        return None
    row = index[1]
    return row if isinstance(row, int) and row >= 0 else None


def is_of(library: str, module: nn.Module, methods: Collection[str]) -> bool:
    """Whether a module's methods are those of a library: neither overridden by a subclass nor replaced.

    Args:
        library: Name of its package.
        module: Patched or not.
        methods: Their names; those that it doesn't have are none.
    """
    cls = host_class(module)
    functions: list[Callable[..., Any]] = [getattr(cls, name) for name in methods if hasattr(cls, name)]
    # Accelerate's dispatched and prepared models have a forward that calls their class's.
    by_accelerate = "_old_forward" in module.__dict__ or "_original_forward" in module.__dict__
    replaced = [name for name in methods if name in module.__dict__ and not by_accelerate]
    return not replaced and all(str(getattr(f, "__module__", "")).partition(".")[0] == library for f in functions)
