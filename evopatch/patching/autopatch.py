"""Patch the models that an unmodified script builds; the only user of wrapt."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from ..config import EvoConfig
from ..errors import UnsupportedModelError
from . import registry
from .apply import apply, is_patched

logger = logging.getLogger("evopatch.autopatch")

_MAKERS = {"timm": "create_model", "transformers.modeling_utils": "PreTrainedModel.from_pretrained"}
"""By module, what makes a library's models."""

_calls = threading.local()
"""Whether a thread is inside of such a call; of nested scopes the innermost patches."""


@contextmanager
def autopatch(
    keep_ratio: float | Sequence[float] | None = None, config: EvoConfig | None = None
) -> Iterator[list[nn.Module]]:
    """Inside, every supported model that `timm.create_model` or a `from_pretrained` of transformers returns is patched.

    Also where a module has imported `create_model` by name, and where a library is imported only inside. Models without
    a patchable part are left alone; where an adapter refuses a model, a warning of the logger `evopatch.autopatch` says
    why. On leaving, the functions are what they were; the models that were made stay patched.

    Args:
        keep_ratio: As for `evopatch.apply`.
        config: As for `evopatch.apply`.

    Yields:
        The models that were patched, in the order in which they were made.

    Raises:
        ConfigError: From the function that makes a model, if a setting doesn't fit it.
    """
    from wrapt import register_post_import_hook

    patched: list[nn.Module] = []
    scope = _Scope(_Maker(keep_ratio, config, patched))
    _scopes.append(scope)
    try:
        for library in _MAKERS:
            if library in sys.modules:
                scope.wrap(sys.modules[library])
            elif library not in _awaited:
                _awaited.add(library)
                register_post_import_hook(_imported, library)
        yield patched
    finally:
        _scopes.remove(scope)
        scope.close()


class _Scope:
    """The functions that one `autopatch` wraps."""

    def __init__(self, maker: _Maker) -> None:
        self._maker = maker
        self._undo = ExitStack()

    def wrap(self, module: ModuleType) -> None:
        from wrapt import unwrap_object, wrap_function_wrapper

        for owner, name in _places(module, _MAKERS[module.__name__]):
            self._undo.callback(unwrap_object, owner, name, wrap_function_wrapper(owner, name, self._maker))

    def close(self) -> None:
        self._maker.end()
        self._undo.close()


_scopes: list[_Scope] = []
"""Those that are open, the outermost first."""

_awaited: set[str] = set()
"""Modules with a hook on their import. It can't be taken back, so it is one for all scopes and knows none of them."""


def _imported(module: ModuleType) -> None:
    _awaited.discard(module.__name__)
    for scope in list(_scopes):
        scope.wrap(module)


def _places(module: ModuleType, name: str) -> list[tuple[Any, str]]:
    if "." in name:
        return [(module, name)]
    # A function is called by every name under which a module has imported it.
    original = _innermost(getattr(module, name))
    modules = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
    return [(m, key) for m in modules for key, value in list(vars(m).items()) if _innermost(value) is original]


def _innermost(value: Any) -> Any:
    from wrapt import FunctionWrapper

    # Scopes may be nested: every name has a wrapper of its own then.
    while type(value) is FunctionWrapper:
        value = value.__wrapped__
    return value


class _Maker:
    """Stands before a function that makes models; patches what the outermost of such calls in a thread returns."""

    def __init__(
        self, keep_ratio: float | Sequence[float] | None, config: EvoConfig | None, patched: list[nn.Module]
    ) -> None:
        self._keep_ratio, self._config = keep_ratio, config
        self._patched: list[nn.Module] | None = patched

    def end(self) -> None:
        """References to a wrapped function may outlive the scope: they patch nothing then, and hold no model."""
        self._patched = None

    def __call__(self, wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        patched = self._patched
        if patched is None or getattr(_calls, "inside", False):
            return wrapped(*args, **kwargs)
        _calls.inside = True
        try:
            made = wrapped(*args, **kwargs)
        finally:
            _calls.inside = False
        model = made[0] if isinstance(made, tuple) else made  # with output_loading_info=True it is a pair
        if self._patch(model):
            patched.append(model)
        return made

    def _patch(self, model: Any) -> bool:
        if not isinstance(model, nn.Module) or is_patched(model) or not registry.find_hosts(model):
            return False
        try:
            apply(model, self._keep_ratio, self._config)
        except UnsupportedModelError as error:
            logger.warning("left unpatched: %s", error)
            return False
        logger.info("patched a %s", type(model).__name__)
        return True
