"""Containers of blocks in a model that no adapter knows, and who walks over them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError, UnsupportedModelError
from ..rewrite.classes import host_class
from ..rewrite.tracing import TraceSpec, attention_cores
from ..rewrite.walking import Manner, walkers

SEQUENCES = (nn.ModuleList, nn.Sequential)


def container_of(model: nn.Module, blocks: str) -> Any:
    try:
        container = model.get_submodule(blocks)
    except AttributeError:
        found = ", ".join(repr(name) for name in containers(model)) or "none"
        raise ConfigError(
            f"{type(model).__name__} has no submodule {blocks!r}: expected the path of the container of its blocks. "
            f"Containers of modules with attention: {found}; see evopatch.inspect(model)"
        ) from None
    if not isinstance(container, SEQUENCES) or not len(container):
        raise ConfigError(
            f"{blocks!r} is a {type(container).__name__}: expected an nn.ModuleList or nn.Sequential of blocks. See "
            "evopatch.inspect(model)"
        )
    return container


def containers(model: nn.Module) -> list[str]:
    """Paths of the outermost lists and sequences of two or more modules that all hold an attention core."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        several = isinstance(module, SEQUENCES) and len(module) > 1
        if several and not inside and all(attention_cores(block, TraceSpec()) for block in module):
            found.append(name)
    return found


def walked_by(model: nn.Module, blocks: str) -> tuple[str, str]:
    """The path of the innermost module around a container whose code walks over it, and the container's path in it."""
    parts = blocks.split(".")
    for length in range(len(parts) - 1, -1, -1):
        name, path = ".".join(parts[:length]), ".".join(parts[length:])
        holder = model.get_submodule(name)
        if not isinstance(holder, (*SEQUENCES, nn.ModuleDict)) and walkers_of(holder, path):
            return name, path
    raise UnsupportedModelError(
        f"nothing around {blocks!r} in {type(model).__name__} calls its blocks by that name: expected a module whose "
        f"forward does, such as `for block in self.{parts[-1]}: x = block(x)`"
    )


def walkers_of(host: nn.Module, path: str) -> dict[str, Manner]:
    return walkers(host_class(host), path.rpartition(".")[2])
