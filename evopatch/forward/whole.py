"""Whether nothing but the prefix tokens is read of what a host's last block returns."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..rewrite.reading import is_of
from .hooks import has_foreign_hooks, wants_tokens
from .host_state import HostState

_LIBRARIES = {"torch", "timm", "transformers", "evopatch"}
_BY_TOKEN = (nn.Linear, nn.Identity, nn.Dropout, nn.Tanh, nn.GELU, nn.ReLU, nn.SiLU)
_OVER_TOKENS = ("batch", "group", "instance", "response")
"""In names of norms that do something else to a token when other tokens are there."""


def reads_prefix_only(host: Any, library: str, methods: Collection[str], after: Iterable[nn.Module | None]) -> bool:
    """For a whole forward whose head was found to read prefix tokens only: whether that is still so, and nobody else
    looks.

    Args:
        host: Patched.
        library: Name of its package.
        methods: Names of the host's methods that a whole forward is made of.
        after: The modules between the last block and the head.
    """
    state: HostState = host._evo_state
    if not state.reads_out or not is_of(library, host, methods):
        return False
    if not all(_is_around(host, path, state) for path in state.around_blocks):
        return False
    return all(module is None or (_treats_tokens_alone(module) and not wants_tokens(module)) for module in after)


def _is_around(host: nn.Module, path: str, state: HostState) -> bool:
    """Whether a module between host and blocks is still there, with nobody's hook, and holds nothing but what was
    patched if it is a container."""
    module: nn.Module | None = host
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    # A stage may have gone, as by timm's prune_intermediate_layers.
    if module is None or has_foreign_hooks(module):
        return False
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return True
    return all(f"{path}.{name}" in state.known_paths for name in module._modules)


def _treats_tokens_alone(module: nn.Module) -> bool:
    """Whether what a module makes of a token can't depend on other tokens, by the classes in it."""
    for inner in module.modules():
        name = type(inner).__name__.lower()
        norm = "norm" in name and not any(word in name for word in _OVER_TOKENS)
        known = type(inner).__module__.partition(".")[0] in _LIBRARIES
        plain = isinstance(inner, _BY_TOKEN) or norm or "pooler" in name or type(inner) is nn.Sequential
        if not known or not plain:
            return False
    return True
