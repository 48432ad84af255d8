"""What a trace records as a call, besides the forwards of modules; for the length of the trace."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from .fast_paths import forward_of


@contextmanager
def leaf_methods(shim: nn.Module, tracer: fx.Tracer, names: tuple[str, ...]) -> Iterator[None]:
    """Record calls of these methods as nodes, so that what they read is read when the code runs."""
    patched: list[tuple[nn.Module, str]] = []

    def recorder(path: str, method: str) -> Callable[..., fx.Proxy]:
        def record(*args: Any, **kwargs: Any) -> fx.Proxy:
            module = tracer.create_proxy("get_attr", path, (), {})
            return tracer.create_proxy("call_method", method, (module, *args), kwargs)

        return record

    try:
        for path, module in shim.named_modules():
            for method in names:
                if hasattr(type(module), method):
                    module.__dict__[method] = recorder(path, method)
                    patched.append((module, method))
        yield
    finally:
        for module, method in patched:
            del module.__dict__[method]


@contextmanager
def leaf_functions(shim: nn.Module, functions: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Record calls of these functions from a traced forward, as torch.fx does only of forwards of modules it calls."""
    patched: list[tuple[dict[str, Any], str, Any]] = []
    scopes = {id(scope): scope for scope in (_globals(module) for module in shim.modules())}
    counting = [scope for scope in scopes.values() if "len" not in scope]
    # torch before 2.9 takes numbers only for its rate of dropout.
    leaves = [*functions, F.scaled_dot_product_attention]
    scopes[id(vars(F))] = vars(F)
    if (einops := sys.modules.get("einops")) is not None:  # looks at what it is given
        leaves += [einops.rearrange, einops.repeat, einops.reduce, einops.einsum]
        scopes[id(vars(einops))] = vars(einops)
    try:
        for scope in counting:
            scope["len"] = _recorded(len)  # whose result may be no proxy
        for scope in scopes.values():
            for function in leaves:
                if scope.get(function.__name__) is function:
                    patched.append((scope, function.__name__, function))
                    scope[function.__name__] = _recorded(function)
        yield
    finally:
        for scope, name, function in patched:
            scope[name] = function
        for scope in counting:
            del scope["len"]


def _globals(module: nn.Module) -> dict[str, Any]:
    return getattr(inspect.unwrap(forward_of(module)), "__globals__", {})


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        traced = next((value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
        if traced is None:  # called by another thread
            return function(*args, **kwargs)
        return traced.tracer.create_proxy("call_function", function, args, kwargs)

    return record


@contextmanager
def dropout_rates(shim: nn.Module, tracer: fx.Tracer) -> Iterator[None]:
    """Record where a forward reads the rate of a dropout module, as fused attention does, instead of the rate."""
    paths = {id(module): path for path, module in shim.named_modules() if type(module) is nn.Dropout}

    class Recorded(nn.Dropout):
        @property
        def p(self) -> Any:  # type: ignore[override]
            module = tracer.create_proxy("get_attr", paths[id(self)], (), {})
            return tracer.create_proxy("call_function", getattr, (module, "p"), {})

    dropouts = [module for module in shim.modules() if id(module) in paths]
    try:
        for module in dropouts:
            module.__class__ = Recorded
        yield
    finally:
        for module in dropouts:
            module.__class__ = nn.Dropout
