"""What all patched blocks have in common."""

from __future__ import annotations

from typing import Any

from ..rewrite.classes import Steered
from .host_state import HostState


class GuardedBlock(Steered):
    """Mixin of a patched block: refuses to run outside of its host's forward, where the pass would be missing."""

    _evo_state: HostState
    _evo_name: str

    def forward(self, *args: Any, evo: Any = None, **kwargs: Any) -> Any:
        """What a step of the slow-fast forward gives, or the host's own."""
        if evo is None:
            self._evo_state.refuse_bypass(self._evo_name)
        return Steered.forward(self, *args, evo=evo, **kwargs)

    def _evo_repr(self) -> str:
        return self._evo_state.describe(self._evo_name)
