"""What an architecture has to do to be patched."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar

from torch import nn

from ..forward.block import SlowFastBlock, TappedAttention, block_codes
from ..forward.host_state import HostState
from ..forward.multihead_module import TappedMultihead
from ..forward.spec import HostSpec, qualified
from ..rewrite.alike import fingerprint
from ..rewrite.classes import Steered, Swapped
from ..rewrite.fast_paths import is_multihead
from ..rewrite.graph import Code, generate_core
from ..rewrite.tracing import TraceSpec, on_the_way
from ..rewrite.view import is_looked_into, is_plain
from .changes import Change, check_forward, forwards_of
from .merge_probe import check_merges, is_unknown

__all__ = ["Adapter", "Change", "HostSpec"]


class Adapter(ABC):
    """Knows one architecture of one library. About 60 lines; see `adapters/evopatch_timm/vit.py`."""

    mixin: ClassVar[type[Swapped]]
    """Goes before the host's class: wraps the methods that walk over the blocks (see `forward.walk`)."""

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

    def why_not(self, module: nn.Module) -> str:
        """Why a module of the library that looks like a host isn't served, after its name: "attends inside windows".

        Args:
            module: Any part of a model in which no adapter serves anything.

        Returns:
            Empty where there is nothing to say.
        """
        return ""

    def plan(self, host: nn.Module, state: HostState) -> list[Change]:
        """Every change to the host and its blocks. Everything that can fail, and nothing that changes the model.

        Raises:
            UnsupportedModelError: If a block can't be patched; names it.
        """
        changes = [Change(host, self.mixin, {"_evo_state": state}), *passages(host, state.index_of)]
        for name, block in named_blocks(host, state):
            changes += block_changes(block, name, state)
        return changes

    def plan_holder(self, holder: nn.Module, host: nn.Module) -> list[Change]:
        """Changes to the module that holds a host, for one that reads nothing but prefix tokens of what the host gives.

        Args:
            holder: Has the host among its children.
            host: An instance of one of `hosts()`.
        """
        return []


def block_changes(
    block: nn.Module,
    name: str,
    state: HostState,
    mixin: type[SlowFastBlock] = SlowFastBlock,
    attention_mixin: type[TappedAttention] = TappedAttention,
    judged: bool = False,
) -> list[Change]:
    """The changes to one block: to itself, its attention modules, and the modules on the way to them.

    Args:
        block: To be patched.
        name: Fully qualified, for errors.
        state: Of its host.
        mixin: For the block.
        attention_mixin: For its attention modules.
        judged: It is known that it makes of merged tokens what it makes of all of them.

    Raises:
        UnsupportedModelError: If it can't be traced, a forward was replaced on a module itself, or it has modules of
            one's own and does something else with merged tokens (see `merge_probe`).
    """
    alike = fingerprint(block)
    if alike not in state.generated:
        if not judged and is_unknown(block):
            as_here = partial(block_changes, mixin=mixin, attention_mixin=attention_mixin, judged=True)
            check_merges(block, name, state.spec, as_here)
        state.generated[alike] = _generate(block, name, state.spec.trace, mixin, attention_mixin)
    codes, attentions = state.generated[alike]
    changes = [Change(block, mixin, {"_evo_state": state, "_evo_name": name, **codes})]
    changes += passages(block, codes["_evo_cores"])
    for core, (own_trace, code) in attentions.items():
        attention, attention_name = block.get_submodule(core), f"{name}.{core}"
        check_forward(attention, attention_name)
        own = {"_evo_name": attention_name, "_evo_trace": own_trace, "_evo_code": code}
        changes.append(Change(attention, TappedMultihead if is_multihead(attention) else attention_mixin, own))
    return changes


def _generate(
    block: nn.Module,
    name: str,
    trace: TraceSpec,
    mixin: type[SlowFastBlock],
    attention_mixin: type[TappedAttention],
) -> tuple[dict[str, Any], dict[str, tuple[TraceSpec, Code]]]:
    """The code of a block, and of its attention modules by path."""
    codes = block_codes(mixin, block, name, trace)
    attentions = {}
    for core in filter(None, codes["_evo_cores"]):
        own_trace = dataclasses.replace(trace, inputs=codes["_evo_metric"].given.get(core, ()))
        traced = attention_mixin._evo_traceable(block.get_submodule(core))
        attentions[core] = own_trace, generate_core(traced, f"{name}.{core}", own_trace)
    return codes, attentions


def passages(module: nn.Module, paths: Any) -> list[Change]:
    """Changes to the modules that are called on the way from a module to those at the paths, without these."""
    between = [path for path in on_the_way(paths) if path not in paths]
    inner = [module.get_submodule(path) for path in between]
    return [Change(m, Steered, {}) for m in inner if not (is_looked_into(m) and is_plain(m))]


def named_blocks(host: nn.Module, state: HostState) -> list[tuple[str, nn.Module]]:
    """A host's blocks with their fully qualified names.

    Raises:
        UnsupportedModelError: If a block's forward was replaced on the block itself.
    """
    blocks = []
    for first, *_ in state.blocks:
        block = host.get_submodule(first)
        name = qualified(state.name, first)
        check_forward(block, name)
        blocks.append((name, block))
    return blocks


def walking_methods(adapter: Adapter) -> set[str]:
    """Names of a host's methods that walk over its blocks."""
    return set(forwards_of(getattr(adapter, "mixin", nn.Module)))


def walks_by_itself(host: nn.Module, adapter: Adapter, state: HostState) -> bool:
    """Whether code that isn't the library's may walk over a host's blocks, and look at tokens in between.

    A subclass may override any method and call `super()`; it walks by itself where one of its functions names the
    container of the blocks, or one of its forward methods calls none: whatever it calls then walks.
    """
    libraries = {cls.__module__.partition(".")[0] for cls in adapter.hosts()}
    names = {part for block in state.blocks for path in block for part in path.split(".") if not part.isdigit()}
    walking = walking_methods(adapter)
    for cls in type(host).__mro__:
        if cls in (nn.Module, object):
            continue
        for value in vars(cls).values():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            origin = str(getattr(function, "__module__", "") or "").partition(".")[0]
            if not hasattr(function, "__code__") or origin in {*libraries, "torch"}:
                continue
            if _names(function.__code__, names):
                return True
            if function.__name__ in walking and not _names(function.__code__, walking):
                return True
    return False


def _names(code: Any, names: set[str]) -> bool:
    if not names.isdisjoint(code.co_names) or not names.isdisjoint(c for c in code.co_consts if isinstance(c, str)):
        return True
    return any(_names(inner, names) for inner in code.co_consts if hasattr(inner, "co_names"))
