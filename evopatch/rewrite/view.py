"""Stand-ins, for the length of one forward pass: a module seen with other children, called with something else to run.

A module's own forward runs on a `View` of it, so nothing of a forward is copied. Children that a pass has something to
say to are called through a `Call`: by their own `__call__`, so that hooks, sharding and offloading see a normal call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, doesn't import the compiler

from ..errors import BypassError
from .classes import Steered, Swapped, host_class

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WAYS_IN = ("forward", "__call__", "__iter__", "__reversed__", "__getitem__", "__len__", "keys", "values", "items")

# torch.compile before torch 2.9 can't follow the question, and such methods neither.
_CAN_BE_ASKED = torch.__version__ >= "2.9"


def on_view(function: Callable[..., Any], view: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a module on a view of it."""
    if _CAN_BE_ASKED and _looks_at_class(function):
        return _run_uncompiled(function, view, *args, **kwargs)
    return function(view, *args, **kwargs)


def _looks_at_class(function: Callable[..., Any]) -> bool:
    """Whether a method has a zero-argument super(), which looks at the view's class: torch.compile can't."""
    return "__class__" in function.__code__.co_freevars


@_disable_dynamo
def _run_uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class View:
    """Stands for a module in its own methods, with other attributes in some places: the module in everything else."""

    def __init__(self, module: Any, attributes: Mapping[str, Any]) -> None:
        # One by one and past its own `__setattr__`: torch.compile before torch 2.12 follows nothing else here.
        object.__setattr__(self, "_evo_viewed", module)
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # A zero-argument super() in a subclass of the host's class checks it. torch.compile looks at an instance
        # that was never initialised.
        module = self.__dict__.get("_evo_viewed")
        return View if module is None else type(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, on this view."""
        return on_view(host_class(self._evo_viewed).forward, self, *args, **kwargs)

    def instead(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a `Steered` module runs to run on this view of it."""
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        module = self._evo_viewed
        value = getattr(module, name)
        # Methods that the forward calls look at this view, too, and are the module's own; unless they were set on the
        # module itself. Those that every module has look at the module.
        if not isinstance(value, MethodType) or name in module.__dict__ or hasattr(nn.Module, name):
            return value
        function = getattr(host_class(module), name, value.__func__)
        return partial(_run_uncompiled, function, self) if _looks_at_class(function) else partial(function, self)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._evo_viewed, name, value)


def view_of(module: nn.Module, children: Mapping[str, Any]) -> View | ContainerView:
    """What stands for a module whose children are others.

    Args:
        module: Any one.
        children: All of them, by name.
    """
    if not isinstance(module, CONTAINERS):
        return View(module, children)
    return ContainerView(module, children) if is_plain(module) else OwnContainerView(module, children)


def is_plain(container: nn.Module) -> bool:
    """Whether the class of an `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict` leaves to torch how it is called and
    how its items are reached."""
    return not own_ways(container)


def own_ways(container: nn.Module) -> list[str]:
    """Names of the methods by which a container is called or its items are reached, where its class has its own."""
    cls = host_class(container)
    torchs = next(base for base in CONTAINERS if isinstance(container, base))
    return [name for name in _WAYS_IN if getattr(cls, name, None) is not getattr(torchs, name, None)]


def is_looked_into(module: nn.Module) -> bool:
    """Whether a module is a list or dict of others that can't be called itself."""
    return isinstance(module, CONTAINERS) and host_class(module).forward is nn.Module.forward


class OwnContainerView(View):
    """Stands for a container of a class with a forward, or ways to its items, of its own, which run on this."""

    def __init__(self, container: Any, items: Mapping[str, Any]) -> None:
        super().__init__(container, {"_modules": dict(items), **items})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # By its own call, so that its hooks run.
        return self._evo_viewed(*args, evo=self.instead, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._by("__iter__"))

    def __reversed__(self) -> Iterator[Any]:
        own = hasattr(host_class(self._evo_viewed), "__reversed__")
        return iter(self._by("__reversed__") if own else [self[index] for index in range(len(self) - 1, -1, -1)])

    def __len__(self) -> int:
        return int(self._by("__len__"))

    def __getitem__(self, index: Any) -> Any:
        cls: Any = host_class(self._evo_viewed)
        if cls.__getitem__ in [base.__getitem__ for base in CONTAINERS] and isinstance(
            index, slice
        ):  # it would make a container of what aren't modules
            return ContainerView(None, self._modules)[index]
        return self._by("__getitem__", index)

    def __contains__(self, key: Any) -> bool:
        return key in self._modules if isinstance(self._evo_viewed, nn.ModuleDict) else key in list(self)

    def _by(self, method: str, *args: Any) -> Any:
        return on_view(getattr(host_class(self._evo_viewed), method), self, *args)


class ContainerView:
    """Stands for a container of modules, whose items are others. No instance of its class: libraries look inside it.

    Args:
        container: An `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict`, or None for a part of one.
        items: By name.
    """

    # torch.compile asks an instance that was never initialised.
    _evo_viewed: Any = None
    _evo_items: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, container: Any, items: Mapping[str, Any]) -> None:
        self._evo_viewed = container
        self._evo_items = dict(items)

    def __call__(self, x: Any) -> Any:
        container: Any = self._evo_viewed
        if isinstance(container, Steered):  # by its own call, so that its hooks run
            return container(x, evo=self.run)  # type: ignore[operator]
        if container is not None and has_hooks(container):
            raise BypassError(
                f"a {type(container).__name__} of blocks that took the place of another after evopatch.apply has "
                "hooks, which would not run: use evopatch.remove(model) before such changes, and evopatch.apply after"
            )
        return self.run(container, x)

    def run(self, container: Any, x: Any) -> Any:
        """What a sequence does: one item after the other."""
        for item in self:
            x = item(x)
        return x

    def __iter__(self) -> Iterator[Any]:
        # A mapping yields its keys.
        mapping = isinstance(self._evo_viewed, nn.ModuleDict)
        return iter(self._evo_items) if mapping else iter(self._evo_items.values())

    def __len__(self) -> int:
        return len(self._evo_items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self._evo_items[index]
        items = list(self._evo_items.values())
        if isinstance(index, slice):
            return ContainerView(None, {str(number): item for number, item in enumerate(items[index])})
        return items[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_evo_items" if name in ("keys", "values", "items") else "_evo_viewed"], name)


class Call:
    """Stands where a module is called: calls it with something else to run than its own forward.

    Args:
        module: A `Steered` one, or something that holds it and passes keyword arguments on, such as a wrapper.
        run: A function of the module and its arguments.
        seen: What stands for the module where its attributes are read.
    """

    def __init__(self, module: Any, run: Callable[..., Any], seen: Any = None) -> None:
        self._evo_module = module
        self._evo_run = run
        self._evo_seen = module if seen is None else seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._evo_module(*args, evo=self._evo_run, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_evo_seen"], name)


def check_steered(module: nn.Module, name: str, expected: type[Swapped] = Steered) -> None:
    """Whether a module, when called, runs what it is given.

    Args:
        module: To be called.
        name: Its fully qualified name, for errors.
        expected: The mixin that it was patched with.

    Raises:
        BypassError: If it was replaced after the patch, or its forward or class was.
    """
    advice = "Use evopatch.remove(model) before such changes, and evopatch.apply after them"
    if isinstance(module, expected):
        # Accelerate's dispatched modules have one, which calls their class's.
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            raise BypassError(
                f"{name} ({type(module).__name__}) got a forward of its own after evopatch.apply, beside its class's, "
                f"which the patch works by. {advice}"
            )
        return
    if "_orig_mod" in module._modules:
        advice = f"To compile single modules, call {name}.compile(), which wraps nothing"
    wrapped = any(isinstance(inner, expected) for inner in module.children())
    if not wrapped or not _passes_keywords(module):
        raise BypassError(
            f"{name} is a {type(module).__module__}.{type(module).__qualname__} now: expected the module that "
            "evopatch.apply patched, or a wrapper around it whose forward passes keyword arguments (**kwargs) on. "
            f"{advice}"
        )


def _passes_keywords(module: nn.Module) -> bool:
    code = type(module).forward.__code__
    return bool(code.co_flags & _VARKEYWORDS)


_VARKEYWORDS = 0x08


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks of any kind."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)
