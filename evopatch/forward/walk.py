"""Running a host's own forward with the steps of a forward pass in place of its blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import BypassError, UnsupportedInputError
from ..rewrite.classes import Swapped, host_class
from ..rewrite.view import CONTAINERS, Call, View, check_steered, is_plain, on_view, view_of
from .forward_pass import ForwardPass
from .host_state import HostState
from .spec import qualified
from .tokens import TokenPass


class PatchedHost(Swapped):
    """Mixin of a patched host; an adapter's wraps the methods that walk over the blocks, each by `walk`."""

    _evo_state: HostState


def walk(
    host: PatchedHost,
    method: str,
    *args: Any,
    compact: bool,
    pass_class: type[ForwardPass] = TokenPass,
    grid: tuple[int, int] | None = None,
    reads_prefix: bool = False,
    **kwargs: Any,
) -> Any:
    """Run a host's own method that walks over its blocks, with the slow-fast steps in their place.

    Args:
        host: The patched host.
        method: Name of the method, as the host's class has it.
        compact: Pass the compact set from block to block inside a run, which is faster. False: every step takes and
            returns the full grid in raster order, as callers want who look between the blocks.
        pass_class: How the steps go.
        grid: Rows and columns of the patch tokens that the images make, if that is known.
        reads_prefix: Nothing but the prefix tokens of what the last block returns is read.
    """
    function = getattr(host_class(host), method)
    state = host._evo_state
    if not torch.compiler.is_compiling() and state.methods.get(method, name := full_name(function)) != name:
        compact = reads_prefix = False  # somebody gave the class another one, which may look
    forward_pass = pass_class(state, compact)
    # Also where every block runs as unpatched: another thread may change that, and a block may be computed anew later.
    if not forward_pass.active and compact and is_symbolic(args, kwargs):
        return function(host, *args, **kwargs)
    refuse_symbolic(args, kwargs)
    forward_pass.grid, forward_pass.reads_prefix = grid, reads_prefix and not state.foreign
    view = viewed(host, forward_pass)
    return on_view(function, view, *args, **kwargs)


def full_name(function: Any) -> str:
    """Of a function, with its module."""
    return f"{function.__module__}.{getattr(function, '__qualname__', '')}"


def is_symbolic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch.fx traces the model."""
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))


def refuse_symbolic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """
    Raises:
        UnsupportedInputError: If torch.fx traces the model.
    """
    if is_symbolic(args, kwargs):
        raise UnsupportedInputError(
            "torch.fx.symbolic_trace was given a patched model, which chooses tokens by their values: use "
            "torch.export, or trace the model before evopatch.apply (after evopatch.remove)"
        )


def viewed(host: Any, forward_pass: ForwardPass, path: str = "") -> Any:
    """What a host's own forward runs on; or that of a stage, where its host gives the pass to its stages one by one.

    Args:
        host: The host, or the stage.
        forward_pass: This forward's.
        path: Of the stage in the host.
    """
    steps: list[Step] = []
    view = View(host, _changed(host, path, forward_pass, steps))
    forward_pass.depth = max([forward_pass.depth, *(step.index + 1 for step in steps)])
    followers = [module for step in steps for module in step.followers]
    forward_pass.begin((step.block for step in steps), followers)
    return view


def _changed(module: Any, path: str, forward_pass: ForwardPass, steps: list[Step]) -> dict[str, Any]:
    """What stands for those children of a module that are blocks, or hold some."""
    inside = f"{path}." if path else ""
    children = {n: _viewed(child, inside + n, forward_pass, steps) for n, child in module._modules.items()}
    return {name: child for name, child in children.items() if child is not module._modules[name]}


def _viewed(module: Any, path: str, forward_pass: ForwardPass, steps: list[Step]) -> Any:
    index = forward_pass.index_of.get(path)
    if index is not None:
        check_steered(module, qualified(forward_pass.name, path))
        kind = AddingStep if forward_pass.spec.adds else Step
        steps.append(kind(forward_pass, index, module))
        return steps[-1]
    if path not in forward_pass.around_blocks:
        return module
    changed = _changed(module, path, forward_pass, steps)
    if isinstance(module, CONTAINERS):
        if not is_plain(module):
            check_steered(module, qualified(forward_pass.name, path))
        return view_of(module, _joined({**module._modules, **changed}, forward_pass))
    # By its own call, so that its hooks run.
    view = View(module, changed)
    return Call(module, view.instead, view)


def _joined(children: dict[str, Any], forward_pass: ForwardPass) -> dict[str, Any]:
    """A block may be several modules of its container: they run in its step."""
    joined: dict[str, Any] = {}
    following, last = 0, None
    for name, child in children.items():
        if following and last is not None:
            last.followers.append(child)
            following -= 1
            if forward_pass.spec.adds:
                joined[name] = _added_nothing
            continue
        joined[name] = child
        if isinstance(child, Step):
            following, last = len(forward_pass.blocks[child.index]) - 1, child
    return joined


class Step:
    """One block in one forward pass; stands where the host calls the block."""

    def __init__(self, forward_pass: ForwardPass, index: int, block: nn.Module) -> None:
        self._pass = forward_pass
        self.index = index
        self.block = block
        self.followers: list[nn.Module] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._run(*args, **kwargs)
        if not self.followers:
            return out
        for module in self.followers:
            out = module(out)
        return self._pass.leave(self.index, out)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Through the block's __call__, so that its hooks run, and whatever shards or offloads its weights.
        return self.block(*args, evo=partial(self._pass.run, self.index), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


class AddingStep(Step):
    """The same where the host adds what each module of a block gives to what the module was given."""

    def __call__(self, x: Tensor) -> Any:
        out = self._run(x)
        out = out + self._pass.given.pop(self.index, x)
        for module in self.followers:
            out = module(out) + out
        return _added(self._pass.leave(self.index, out), x)


class Added:
    """What a host gets that adds it to the tokens: their sum is what the whole block gives, be it the compact set.

    Args:
        out: That.
        given: What the host will add.
    """

    def __init__(self, out: Tensor, given: Tensor) -> None:
        self._out, self._given = out, given

    def __add__(self, other: Any) -> Tensor:
        if other is not self._given:
            raise BypassError(
                "what a part of a block gave was added to something else than what the part was given: expected "
                "`x = part(x) + x`, as the host's source said"
            )
        return self._out

    __radd__ = __add__


def _added(out: Tensor, given: Tensor) -> Any:
    # torch.compile follows no sum of a tensor and something else; every block takes and gives all tokens then.
    return out - given if torch.compiler.is_compiling() else Added(out, given)


def _added_nothing(x: Tensor) -> Any:
    """Stands for the parts of a block that its first one's step has run already."""
    return _added(x, x)
