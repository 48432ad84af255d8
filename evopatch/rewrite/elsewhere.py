"""Plain values that a forward reads from what its module holds, such as the scale in a configuration: tracing has
written them into generated code, and no module says when they change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))
_NO_HOLDERS = (*_PLAIN, Tensor, nn.modules.dropout._DropoutNd, type, FunctionType, MethodType, ModuleType)
"""Rates of dropout are read whenever the code runs."""
_OF_TORCH = frozenset(nn.Module().__dict__)
_MISSING = object()
_DEEP = 3


class Elsewhere(NamedTuple):
    """One such value."""

    path: tuple[str, ...]
    """Names of attributes, or keys, on the way to it."""
    value: Any
    """When it was traced."""

    def changed(self, module: nn.Module) -> bool:
        """Whether it is another one now."""
        found: Any = module
        for name in self.path:
            found = found.get(name, _MISSING) if isinstance(found, dict) else getattr(found, name, _MISSING)
        return type(found) is not type(self.value) or found != self.value


def elsewhere(module: nn.Module, names: Iterable[str]) -> tuple[Elsewhere, ...]:
    """
    Args:
        module: That was traced.
        names: Of attributes and keys in the code of its forward.
    """
    return tuple(_found(module, frozenset(names), ()))


def _found(holder: Any, names: frozenset[str], path: tuple[str, ...]) -> Iterator[Elsewhere]:
    for name in sorted(names):
        value = _held(holder, name)
        if path and type(value) in _PLAIN:
            yield Elsewhere((*path, name), value)
        elif value is not _MISSING and not isinstance(value, _NO_HOLDERS) and len(path) < _DEEP:
            yield from _found(value, names, (*path, name))


def _held(holder: Any, name: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(name, _MISSING)
    own = getattr(holder, "__dict__", {})
    if isinstance(holder, nn.Module):
        return _MISSING if name in _OF_TORCH else {**own, **own["_modules"]}.get(name, _MISSING)
    return own.get(name, _MISSING)
