"""Modules that run generated code, which has to be made anew when what was traced is no longer so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from .classes import Swapped


class GeneratesCode(Swapped):
    """Mixin of a module that runs generated code: makes it again after unpickling."""

    _evo_always: ClassVar[str]
    """The attribute that always holds code, but after unpickling."""

    _evo_generate: Callable[[], None]
    """Makes the code anew."""

    def _evo_refresh(self) -> None:
        """Make the code again if the class got another forward, as libraries that patch timm do; not under compile."""
        if torch.compiler.is_compiling():
            return
        if self.__dict__[self._evo_always].source is not self._evo_host_class.forward:
            self._evo_generate()

    def __setattr__(self, name: str, value: Any) -> None:
        before = _value(self, name)
        super().__setattr__(name, value)
        if name in ("training", "__class__") or name.startswith("_"):
            return
        # Tracing has read values such as `num_heads`, and whether there is a module or a tensor of this name.
        if self._evo_always in self.__dict__ and _is_another(value, before):
            self._evo_generate()

    def __setstate__(self, state: dict[str, Any]) -> None:
        inherited: Any = super()
        inherited.__setstate__(state)
        if self.__dict__[self._evo_always] is None:  # a copy has its original's
            self._evo_generate()


_MISSING = object()


def _value(module: Any, name: str) -> Any:
    """Of an attribute, past the class's own properties."""
    own = module.__dict__
    places = (own, own.get("_parameters", {}), own.get("_buffers", {}), own.get("_modules", {}))
    return next((place[name] for place in places if name in place), _MISSING)


def _is_another(value: Any, before: Any) -> bool:
    """Whether generated code that reads an attribute may have to be another one, now that it has this value."""
    if any(isinstance(value, kind) and isinstance(before, kind) for kind in (nn.Module, torch.Tensor)):
        return False  # looked up when it runs
    try:
        return type(value) is not type(before) or bool(value != before)
    except (RuntimeError, ValueError, TypeError):  # such as a list of tensors
        return True
