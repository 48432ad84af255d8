"""Which adapter serves which module: by `isinstance`, without importing a library that the program doesn't use."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from torch import nn

from .adapter import Adapter

# The library whose modules an adapter serves, and where the adapter is. Third parties add theirs as an entry point of
# the group "evopatch.adapters", named by the library: `mylibrary = "mypackage.evopatch:MyAdapter"`.
_BUILT_IN = {
    "timm": ("evopatch_timm.vit:ViTAdapter", "evopatch_timm.levit:LevitAdapter", "evopatch_timm.swin:SwinAdapter"),
    "transformers": (
        "evopatch_transformers.vit:ViTAdapter",
        "evopatch_transformers.levit:LevitAdapter",
        "evopatch_transformers.swin:SwinAdapter",
    ),
}
_GROUP = "evopatch.adapters"


@cache
def _load(target: str) -> Adapter:
    module, _, name = target.partition(":")
    adapter: Adapter = getattr(import_module(module), name)()
    return adapter


def adapters() -> list[Adapter]:
    """Adapters for the libraries that are imported already: a model of another library can't be at hand."""
    loaded = []
    for library, targets in _BUILT_IN.items():
        # A program may well use one library with evopatch, and have the other in a version that has no adapter.
        if library in sys.modules and library not in failures():
            loaded += [_load(target) for target in targets]
    return loaded + [_load(e.value) for e in entry_points(group=_GROUP) if e.name in sys.modules]


def failures() -> dict[str, str]:
    """Imported libraries whose built-in adapters can't be used, and why: their version is another one, as a rule."""
    reasons = {}
    for library, targets in _BUILT_IN.items():
        if library in sys.modules:
            try:
                for target in targets:
                    _load(target)
            except ImportError as error:
                reasons[library] = str(error)
    return reasons


def find(module: nn.Module, among: list[Adapter] | None = None) -> Adapter | None:
    """The adapter that serves this module itself, not one inside it."""
    for adapter in adapters() if among is None else among:
        if isinstance(module, adapter.hosts()):
            return adapter
    return None


def find_hosts(model: nn.Module) -> list[tuple[str, nn.Module, Adapter]]:
    """Every outermost host in a model, the model itself included: name, module, adapter."""
    among = adapters()
    found: list[tuple[str, nn.Module, Adapter]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer, _, _ in found):
            continue
        if (adapter := find(module, among)) is not None:
            found.append((name, module, adapter))
    return found
