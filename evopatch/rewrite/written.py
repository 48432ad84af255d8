"""What a forward sets on its own module while it is traced, where it sets what stands for a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from ..errors import AttentionNotFoundError

_PLACES = ("_parameters", "_buffers", "_modules")


class Written:
    """Attributes of the traced modules that their forwards set."""

    def __init__(self) -> None:
        self.own: set[str] = set()
        """Names of those of the traced module itself."""
        self.tensors: set[str] = set()
        """Paths in it of those that hold something made of tokens, of modules inside it, too."""


@contextmanager
def taken_back(module: nn.Module, paths: Iterable[str]) -> Iterator[Written]:
    """Afterwards the modules are as they were; what was set is said then.

    Args:
        module: The one that is traced.
        paths: Of the modules in it that are traced through.
    """
    written = Written()
    modules = {"": module} | {f"{path}.": module.get_submodule(path) for path in paths}
    before = [[dict(place) for place in _places(each)] for each in modules.values()]
    try:
        yield written
    finally:
        for (path, each), kept in zip(modules.items(), before, strict=True):
            for place, former in zip(_places(each), kept, strict=True):
                for name in [n for n, value in place.items() if value is not former.get(n, _MISSING)]:
                    if not path:
                        written.own.add(name)
                    if isinstance(place[name], fx.Proxy):
                        written.tensors.add(path + name)
                    # One by one, as other threads may read them meanwhile.
                    if name in former:
                        place[name] = former[name]
                    else:
                        del place[name]


_MISSING = object()


def _places(module: nn.Module) -> list[dict[str, Any]]:
    return [module.__dict__, *(module.__dict__[place] for place in _PLACES)]


def refuse(names: set[str], module: nn.Module, name: str) -> None:
    """
    Args:
        names: What a forward sets that can't be kept.
        module: Whose.
        name: Fully qualified.

    Raises:
        AttentionNotFoundError: If there is any.
    """
    if names:
        raise AttentionNotFoundError(
            f"{name} ({type(module).__name__}) sets {', '.join(sorted(names))} on itself in its forward, which the "
            "patched one, generated from it and called on a compact set, would not: expected a forward that leaves its "
            "module as it is. Take that line out, or look by a forward hook, which sees all tokens"
        )
