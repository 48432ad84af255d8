"""Containers of blocks in a model that no adapter knows, and who walks over them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError, UnsupportedModelError
from ..forward.host_state import HostState
from ..forward.spec import qualified
from ..rewrite.classes import host_class
from ..rewrite.tracing import TraceSpec, attention_cores
from ..rewrite.view import CONTAINERS, own_ways
from ..rewrite.walking import Manner, hands_on, walkers
from .changes import check_forward

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


def looked_at_around(host: nn.Module, state: HostState) -> bool:
    """Whether code of a container between a host and its blocks may look at tokens in between.

    Args:
        host: To be patched.
        state: Its state.

    Raises:
        UnsupportedModelError: If one has a forward of its own beside its class's, or another way to be called; or does
            something of its own between the modules of one block.
    """
    looks = False
    for path in sorted(state.around_blocks):
        module, name = host.get_submodule(path), qualified(state.name, path)
        check_forward(module, name)
        if not isinstance(module, CONTAINERS) or not own_ways(module):
            continue
        described = f"{name} ({type(module).__name__}) is a {_torchs(module)} with ways of its own to run its items"
        if host_class(module).__call__ is not nn.Module.__call__:
            raise UnsupportedModelError(
                f"{described}, among them __call__: expected them in its forward, so that it can be run on other items"
            )
        inside = [block for block in state.blocks if block[0].rpartition(".")[0] == path]
        if not state.spec.adds and any(len(block) > 1 for block in inside):
            raise UnsupportedModelError(
                f"{described}, and a block of {type(host).__name__} is several of them, between which nothing can be "
                f"done: expected a plain {_torchs(module)}"
            )
        looks = looks or own_ways(module) != ["forward"] or not hands_on(host_class(module))
    return looks


def _torchs(container: nn.Module) -> str:
    return "nn." + next(base for base in CONTAINERS if isinstance(container, base)).__name__
