"""Whether nothing but the prefix tokens is read of what a host's last block returns."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..rewrite.reading import is_of
from .hooks import wants_tokens
from .host_state import HostState

# Their modules between the blocks and the head are norms, which do the same to every token.
_LIBRARIES = {"torch", "timm", "transformers", "evopatch"}


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
    return all(module is None or (_is_known(module) and not wants_tokens(module)) for module in after)


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _LIBRARIES
