"""What an architecture has to do to be patched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from ..errors import UnsupportedModelError
from ..forward.spec import HostSpec
from ..forward.tokens import HostState, SlowFastBlock
from ..rewrite import graph
from ..rewrite.classes import Swapped
from .changes import Change

__all__ = ["Adapter", "Change", "HostSpec"]


class Adapter(ABC):
    """Knows one architecture of one library. About 60 lines; see `adapters/evopatch_timm/vit.py`."""

    mixin: ClassVar[type[Swapped]]
    """Goes before the host's class: wraps the methods that walk over the blocks (see `stream.walk`)."""

    notice: ClassVar[str] = ""
    """Where a patched model is not faster: `apply` says it once, as a warning."""

    @abstractmethod
    def hosts(self) -> tuple[type[nn.Module], ...]:
        """The classes that this adapter serves, subclasses included. May import the library."""

    @abstractmethod
    def inspect(self, host: nn.Module, name: str) -> HostSpec:
        """Describe one host.

        Args:
            host: An instance of one of `hosts()`.
            name: Fully qualified, for errors.

        Raises:
            UnsupportedModelError: If this variant can't be patched; says why.
        """

    def grid(self, host: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patch tokens for images of `(height, width)` pixels.

        Not for hosts whose spec has the grids of a pyramid.
        """
        raise NotImplementedError(f"{type(self).__name__} says neither grid nor pyramid of {type(host).__name__}")

    def plan(self, host: nn.Module, state: HostState) -> list[Change]:
        """Every change to the host and its blocks. Everything that can fail, and nothing that changes the model.

        Raises:
            UnsupportedModelError: If a block can't be patched; names it.
        """
        changes = [Change(host, self.mixin, {"_evo_state": state})]
        for name, block in named_blocks(host, state):
            _check_hooks(block, name, state.spec.trace)
            code = graph.generate(block, name, state.spec.trace)
            changes.append(Change(block, SlowFastBlock, {"_evo_state": state, "_evo_name": name, "_evo_code": code}))
        return changes


def named_blocks(host: nn.Module, state: HostState) -> list[tuple[str, nn.Module]]:
    """A host's blocks with their fully qualified names.

    Raises:
        UnsupportedModelError: If a block's forward was replaced on the block itself.
    """
    blocks = []
    for first, *_ in state.blocks:
        block = host.get_submodule(first)
        name = ".".join(filter(None, (state.name, first)))
        check_forward(block, name)
        blocks.append((name, block))
    return blocks


def check_forward(module: nn.Module, name: str) -> None:
    """The patch works by a module's class.

    Raises:
        UnsupportedModelError: If the module's forward was replaced on the module itself.
    """
    # Accelerate's dispatched modules have one, which calls their class's (see `swap`).
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has a forward of its own beside its class's: expected a plain "
            "module, since the patch works by its class. Undo what replaced it, and do it again after apply"
        )


def _check_hooks(block: nn.Module, name: str, trace: graph.TraceSpec) -> None:
    for inner in graph.traced_through(block, trace):
        module = block.get_submodule(inner)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise UnsupportedModelError(
                f"{name}.{inner} ({type(module).__name__}) has hooks, which would not run: the patched block runs "
                "generated code in its place. Remove them, or hook the block or a module inside instead"
            )
