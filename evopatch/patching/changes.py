"""Changing a model's modules in place, all of them or none, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..rewrite.classes import Swapped, is_bound_forward, is_last, restore, swap, swapped_class, wraps_patched


@dataclass(frozen=True)
class Change:
    """One module's change."""

    module: nn.Module
    mixin: type[Swapped] | None
    """Goes before the module's class; None leaves the class alone."""
    attributes: Mapping[str, Any]
    """All named `_evo_...`."""
    pre_hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any] | None = None
    """A forward pre-hook, a function of the module, its arguments and keyword arguments."""


def check(changes: Iterable[Change]) -> None:
    """Everything that can fail about making changes, before the first of them.

    Raises:
        UnsupportedModelError: If a module would be changed twice, or has a method of its own in place of its class's
            that the change is about, or its class can't be derived from.
    """
    seen: dict[int, str] = {}
    for change in changes:
        name = change.attributes.get("_evo_name", "")
        if id(change.module) in seen:
            raise UnsupportedModelError(
                f"{name} is the same module as {seen[id(change.module)]}: expected a block of its own at every depth, "
                "since each has its own plan"
            )
        seen[id(change.module)] = name
        if change.mixin is None:
            continue
        state = change.attributes.get("_evo_state")
        for method in _needed(change):
            check_forward(change.module, name or getattr(state, "name", "") or "the model", method)
        try:
            swapped_class(type(change.module), change.mixin)
        except Exception as error:  # whatever a user's __init_subclass__ or metaclass raises
            raise UnsupportedModelError(
                f"{name or 'the model'} ({type(change.module).__module__}.{type(change.module).__qualname__}): no "
                f"subclass of its class can be made, which patching needs: {type(error).__name__}: {error}"
            ) from error


def forwards_of(mixin: type) -> list[str]:
    """Names of the methods that a mixin puts before those of a module's class: `forward`, `forward_features`."""
    return sorted({name for cls in mixin.__mro__ for name in vars(cls) if name.startswith("forward")})


def _needed(change: Change) -> list[str]:
    """Those without which the change does nothing: not a `forward` that only calls another of them."""
    methods = forwards_of(change.mixin or object)

    def calls_another(method: str) -> bool:
        code = getattr(getattr(type(change.module), method, None), "__code__", None)
        return code is not None and any(name in methods and name != method for name in code.co_names)

    return [method for method in methods if not calls_another(method)]


def check_forward(module: nn.Module, name: str, method: str = "forward") -> None:
    """The patch works by a module's class.

    Raises:
        UnsupportedModelError: If the method was replaced on the module itself.
    """
    # Accelerate's dispatched modules have a forward, which calls their class's (see `swap`).
    known = method == "forward" and (is_bound_forward(module) or "_old_forward" in module.__dict__)
    if method in module.__dict__ and not known:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has a {method} of its own beside its class's: expected a plain "
            "module, since the patch works by its class. Undo what replaced it before apply, and leave it so"
        )


def make(changes: Iterable[Change]) -> None:
    """Make all changes, or after an exception none."""
    made: list[nn.Module] = []
    try:
        for change in changes:
            made.append(change.module)
            if change.mixin is not None:
                swap(change.module, change.mixin)
            change.module.__dict__.update(change.attributes)
            if isinstance(change.module, Swapped):
                change.module._evo_swapped()
            if change.pre_hook is not None:
                change.module.register_forward_pre_hook(change.pre_hook, with_kwargs=True)
                change.module.__dict__["_evo_pre_hook"] = change.pre_hook
    except BaseException:
        for module in made:
            undo(module)
        raise


def check_undo(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModelError: If something else changed a patched module's class since, or wrapped its forward.
    """
    for name, module in model.named_modules():
        if isinstance(module, Swapped) and not is_last(type(module)):
            raise UnsupportedModelError(
                f"'{name or type(module).__name__}' got another class after evopatch.apply, {type(module)}: undo that "
                "first, such as torch's parametrizations or fully_shard"
            )
        if wraps_patched(module):
            raise UnsupportedModelError(
                f"'{name or type(module).__name__}' got a forward of its own after evopatch.apply, which calls the "
                "patched one: take it off first, as by accelerator.unwrap_model(model, keep_fp32_wrapper=False) after "
                "Accelerator.prepare with mixed precision"
            )


def undo(module: nn.Module) -> None:
    """Take back the change of one module, if there is one."""
    _remove_pre_hook(module, module.__dict__.get("_evo_pre_hook"))
    for key in [key for key in module.__dict__ if key.startswith("_evo_")]:
        del module.__dict__[key]
    for key in [key for key in module._buffers if key.startswith("_evo_")]:
        delattr(module, key)
    if isinstance(module, Swapped):
        restore(module)


def _remove_pre_hook(module: nn.Module, hook: Any) -> None:
    # By identity: the handle that registering returns doesn't survive deepcopy.
    for key in [key for key, value in module._forward_pre_hooks.items() if hook is not None and value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
