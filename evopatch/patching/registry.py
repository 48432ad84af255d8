"""Which adapter serves which module: by `isinstance`, without importing a library that the program doesn't use."""

from __future__ import annotations

import re
import sys
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from torch import nn

from .adapter import Adapter

# The library whose modules an adapter serves, and where the adapter is. Third parties add theirs as an entry point of
# the group "evopatch.adapters", named by the library: `mylibrary = "mypackage.evopatch:MyAdapter"`. Theirs come first.
_BUILT_IN = {
    "timm": (
        "evopatch_timm.vit:ViTAdapter",
        "evopatch_timm.levit:LevitAdapter",
        "evopatch_timm.pit:PitAdapter",
        "evopatch_timm.swin:SwinAdapter",
        "evopatch_timm.sam:SamAdapter",
        "evopatch_timm.pvt:PvtAdapter",
        "evopatch_timm.naflex:NaFlexAdapter",
        "evopatch_timm.towers:TowerAdapter",
        "evopatch_timm.gemma:GemmaAdapter",
        "evopatch_timm.cait:CaitAdapter",
    ),
    "transformers": (
        "evopatch_transformers.vit:ViTAdapter",
        "evopatch_transformers.levit:LevitAdapter",
        "evopatch_transformers.swin:SwinAdapter",
        "evopatch_transformers.pvt:PvtAdapter",
        "evopatch_transformers.pvt:StagesAdapter",
        "evopatch_transformers.sam:SamAdapter",
        "evopatch_transformers.sam3:Sam3Adapter",
    ),
    "torchvision": ("evopatch_torchvision.vit:ViTAdapter", "evopatch_torchvision.swin:SwinAdapter"),
}
_LEAST = {"timm": "1.0.12", "transformers": "5.9", "torchvision": "0.21"}
"""The oldest versions that the built-in adapters serve."""
_GROUP = "evopatch.adapters"


@cache
def _load(target: str) -> Adapter:
    module, _, name = target.partition(":")
    adapter = getattr(import_module(module), name)()
    if not isinstance(adapter, Adapter):
        raise TypeError(f"{target} makes a {type(adapter).__name__}: expected an evopatch.patching.adapter.Adapter")
    hosts = adapter.hosts()
    if not isinstance(hosts, tuple) or not all(isinstance(cls, type) for cls in hosts):
        raise TypeError(f"hosts() of {target} returns {hosts!r}: expected a tuple of classes")
    return adapter


def _targets() -> list[tuple[str, str]]:
    """Libraries that are imported already, each with where an adapter for it is; those of third parties come first."""
    registered = [(entry.name, entry.value) for entry in entry_points(group=_GROUP)]
    built_in = [(library, target) for library, targets in _BUILT_IN.items() for target in targets]
    return [(library, target) for library, target in (*registered, *built_in) if library in sys.modules]


def too_old(library: str, least: str) -> str | None:
    """What to say of an imported library that is older than a version; None if it isn't."""
    found = str(getattr(sys.modules[library], "__version__", ""))
    numbers = [[int(number) for number in re.findall(r"\d+", version)[:3]] for version in (found, least)]
    return f"{library} {found} is older than {least}: update it" if numbers[0] < numbers[1] else None


def _attempt(library: str, target: str) -> Adapter | Exception:
    own = target in _BUILT_IN.get(library, ()) and library in _LEAST
    if own and (text := too_old(library, _LEAST[library])):
        return ImportError(text)
    try:
        return _load(target)
    except Exception as error:  # whatever somebody's module raises when it is imported
        if target not in _BUILT_IN.get(library, ()):
            _say_once(f"the adapter {target} for {library} can't be used: {type(error).__name__}: {error}")
        return error


@cache
def _say_once(text: str) -> None:
    warnings.warn(f"{text}. Other adapters are; mend it, or uninstall the package that brings it", stacklevel=2)


def adapters() -> list[Adapter]:
    """Adapters for the libraries that are imported already: a model of another library can't be at hand.

    The first that serves a module is the one: third parties' come first. One that can't be used doesn't keep others
    from it: of a third party it is named in a warning, once; a built-in one is in `failures`, as a program may well use
    one library with evopatch, and have the other in a version that has no adapter.
    """
    found = (_attempt(library, target) for library, target in _targets())
    return [adapter for adapter in found if isinstance(adapter, Adapter)]


def failures() -> dict[str, str]:
    """Imported libraries with an adapter that can't be used, and why: their version is another one, as a rule."""
    found = ((library, _attempt(library, target)) for library, target in reversed(_targets()))
    return {library: str(error) for library, error in found if isinstance(error, Exception)}


def find(module: nn.Module, among: list[Adapter] | None = None) -> Adapter | None:
    """The adapter that serves this module itself, not one inside it."""
    for adapter in adapters() if among is None else among:
        if isinstance(module, adapter.hosts()):
            return adapter
    return None


def find_hosts(model: nn.Module) -> list[tuple[str, nn.Module, Adapter]]:
    """Every outermost host in a model, the model itself included: name, module, adapter. Those that are known and not
    served only where there is no other."""
    among = adapters()
    found: list[tuple[str, nn.Module, Adapter]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer, _, _ in found):
            continue
        if (adapter := find(module, among)) is not None:
            found.append((name, module, adapter))
    return found


def unserved(model: nn.Module) -> dict[str, str]:
    """By path, the outermost modules of a model that adapters know not to be served, each with its class and why."""
    among = adapters()
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer in found):
            continue
        if reason := next(filter(None, (adapter.why_not(module) for adapter in among)), ""):
            found[name] = f"{type(module).__name__} {reason}"
    return found
