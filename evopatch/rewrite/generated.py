"""Modules that run generated code, which has to be made anew when what was traced is no longer so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BypassError
from .classes import Swapped
from .elsewhere import Elsewhere, elsewhere
from .tracing import names_in


class GeneratesCode(Swapped):
    """Mixin of a module that runs generated code: makes it again after unpickling."""

    _evo_always: ClassVar[str]
    """The attribute that always holds code, but after unpickling."""

    _evo_generate: Callable[[], None]
    """Makes the code anew."""
    _evo_kinds: _Kinds
    """What tracing found."""
    _evo_elsewhere: tuple[Elsewhere, ...] = ()
    """What it read from other things that the module holds."""

    def _evo_swapped(self) -> None:
        module: Any = self
        self.__dict__["_evo_kinds"] = _kinds(module)
        self.__dict__["_evo_elsewhere"] = elsewhere(module, names_in(module))

    def _evo_refresh(self) -> None:
        """Make the code again if the class got another forward, as libraries that patch timm do, or a value that it
        read elsewhere has changed.

        Raises:
            BypassError: If a value has under torch.compile, which runs the code that is there.
        """
        module: Any = self
        changed = [read for read in self._evo_elsewhere if read.changed(module)]
        if torch.compiler.is_compiling():
            if changed:
                raise BypassError(
                    f"{self._evo_host_class.__name__}: self.{'.'.join(changed[0].path)} was {changed[0].value} when "
                    "its forward was traced, and is another one: run the model once uncompiled after such a change"
                )
            return
        if changed or self.__dict__[self._evo_always].source is not self._evo_host_class.forward:
            self._evo_make()

    def _evo_make(self) -> None:
        own = self.__dict__
        if own.get("_evo_making"):  # the traced forward itself sets something
            return
        own["_evo_making"] = True
        try:
            self._evo_generate()
        finally:
            del own["_evo_making"]
        self._evo_swapped()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("training", "__class__") or name.startswith("_"):
            return
        code = self.__dict__.get(self._evo_always)
        if code is None or name in code.sets:
            return
        # Tracing has read values such as `num_heads`, and whether there is a module or a tensor of this name. It isn't
        # compared with what is there: `FullyShardedDataParallel` and `nn.DataParallel` take all tensors out, and put
        # others in their places one by one.
        if _is_another(_kind(value), self.__dict__["_evo_kinds"].get(name, _MISSING)):
            self._evo_make()

    def __setstate__(self, state: dict[str, Any]) -> None:
        inherited: Any = super()
        inherited.__setstate__(state)
        if self.__dict__[self._evo_always] is None:  # a copy has its original's
            self._evo_make()


_MISSING = object()


class _Kinds(dict[str, Any]):
    """By the name of an attribute, what generated code depends on of it."""

    def __deepcopy__(self, memo: Any) -> _Kinds:
        return _Kinds(self)  # to compare with: values may be what can't be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kinds, ()  # found anew with the code


def _kinds(module: nn.Module) -> _Kinds:
    own = module.__dict__
    found = {**own, **own["_parameters"], **own["_buffers"], **own["_modules"]}
    return _Kinds((name, _kind(value)) for name, value in found.items() if not name.startswith("_"))


def _kind(value: Any) -> Any:
    """Modules and tensors are looked up when the code runs."""
    return next((kind for kind in (nn.Module, Tensor) if isinstance(value, kind)), value)


def _is_another(value: Any, before: Any) -> bool:
    """Whether generated code that reads an attribute may have to be another one, now that it has this value."""
    try:
        return type(value) is not type(before) or bool(value != before)
    except (RuntimeError, ValueError, TypeError):  # such as a list of tensors
        return True
