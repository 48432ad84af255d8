"""How far a run is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Part of a run's checkpoints."""

    step: int = 0
    """Optimizer steps done."""
    images: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Mean loss of every finished epoch."""
    epoch_loss: float = 0.0
    """Sum over the steps of the current epoch."""
    unreadable: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """For accelerate."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For accelerate."""
        self.__dict__.update(state)
