"""A patched block, as a forward pass sees it: what its mixin adds to a class that only its library knows."""

from __future__ import annotations

from typing import Protocol

from ..rewrite.graph import Code
from .host_state import HostState


class PatchedBlock(Protocol):
    """A block of a flat model, or of a pyramid; see `block.SlowFastBlock`."""

    _evo_state: HostState
    _evo_name: str
    _evo_cores: tuple[str, ...]
    _evo_metric: Code
    _evo_code: Code | None
    training: bool

    def _evo_refresh(self) -> None: ...
