"""Give a module another class and back: keys, parameters, `isinstance`, `deepcopy` and `pickle` stay as they were.

One class per host class and mixin, made when first needed, so subclasses of a library's classes are served too. It
keeps the host class's name, which sharding policies and device maps go by. A pickle names the host class and the mixin,
never the generated class.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

from torch import nn

from ..errors import UnsupportedModelError


class Swapped:
    """Base of the mixins; comes before the host class in the method resolution order."""

    _evo_host_class: type[nn.Module]
    _evo_keeps_name: ClassVar[bool] = False
    """The class has the host class's full name: transformers goes by it to find what a model records."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        mixin = type(self).__mro__[1]
        return (_new, (self.__dict__.get("_evo_versions"), self._evo_host_class, mixin), *reduced[2:])

    def _evo_swapped(self) -> None:
        """After `swap`, and when the mixin's attributes are there."""

    def _evo_repr(self) -> str:
        """What `repr` says of the patch."""
        return ""

    def extra_repr(self) -> str:
        """The module's own, and what the patch is."""
        own, ours = self._evo_host_class.extra_repr(self), self._evo_repr()  # type: ignore[arg-type]
        return ", ".join(filter(None, (own, ours and f"evopatch: {ours}")))

    def __prepare_scriptable__(self) -> Any:
        raise UnsupportedModelError(
            f"torch.jit.script was given a patched {self._evo_host_class.__name__}, whose forward runs Python that "
            "TorchScript has no types for: use torch.jit.trace or torch.export, or evopatch.remove(model) before"
        )


class Steered(Swapped):
    """Mixin of a module that a forward pass may give something else to run than the module's own forward."""

    def forward(self, *args: Any, evo: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """
        Args:
            evo: What to run: a function of the module and its arguments. None: the module's own forward.
        """
        if evo is None:
            return self._evo_host_class.forward(self, *args, **kwargs)
        return evo(self, *args, **kwargs)


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def swapped_class(host_class: type[nn.Module], mixin: type[Swapped]) -> type[nn.Module]:
    """The class of a patched `host_class`, the same object at every call."""
    key = (host_class, mixin)
    if key not in _classes:
        own = (mixin.__module__, f"{mixin.__name__}[{host_class.__qualname__}]")
        module, name = (host_class.__module__, host_class.__qualname__) if mixin._evo_keeps_name else own
        namespace = {"_evo_host_class": host_class, "__module__": module, "__qualname__": name}
        _classes[key] = type(host_class.__name__, (mixin, host_class), namespace)
    return _classes[key]


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Let `module` run the mixin's methods."""
    _become(module, swapped_class(type(module), mixin))


def is_last(cls: type) -> bool:
    """Whether nothing changed the class of a swapped module after `swap`."""
    return "_evo_host_class" in cls.__dict__


def restore(module: nn.Module) -> None:
    """The inverse of `swap`."""
    _become(module, host_class(module))


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Accelerate's dispatched and prepared models keep bound methods that were taken from the former class."""
    if is_bound_forward(module):
        del module.__dict__["forward"]
    module.__class__ = cls
    for name in ("_old_forward", "_original_forward"):
        if name in module.__dict__:
            module.__dict__[name] = MethodType(cls.forward, module)


def is_bound_forward(module: nn.Module) -> bool:
    """Whether what a module has as its forward is only that of its class, as what took wrappers off leaves it."""
    own = module.__dict__.get("forward")
    return isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward


def wraps_patched(module: nn.Module) -> bool:
    """Whether a forward that a module was given calls the one of its patched class.

    Accelerate's hooks call whatever the module has as `_old_forward`, which `_become` exchanges.
    """
    own = None if is_bound_forward(module) else module.__dict__.get("forward")
    by_name = module.__dict__.get("_old_forward")
    while own is not None and (inner := getattr(own, "__wrapped__", getattr(own, "__func__", None))) is not None:
        if inner == by_name:
            return False
        own = inner
    return own is not None and _is_of(own, type(module)) and not _is_of(own, host_class(module))


def _is_of(function: object, cls: type) -> bool:
    return any(vars(base).get("forward") is function for base in cls.__mro__)


def host_class(module: object) -> type[nn.Module]:
    """The class that a module has, or had before `swap`."""
    cls: type[nn.Module] = getattr(type(module), "_evo_host_class", None) or type(module)  # type: ignore[assignment]
    return cls


def _new(versions: object, host_class: type[nn.Module], mixin: type[Swapped]) -> nn.Module:
    # The versions come first, so that unpickling meets them before what another version may have elsewhere.
    cls = swapped_class(host_class, mixin)
    return cls.__new__(cls)
