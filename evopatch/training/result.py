"""What a fine-tuning run did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..measure.accuracy import Evaluation
from ..measure.timing import Speed

TIMED_BATCH = 16
"""At most so many images in a batch for the speeds of a result."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run did."""

    losses: tuple[float, ...]
    """Mean training loss of every epoch."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Training time, without evaluations; of a resumed run, all parts together."""
    images_per_second: float
    """Training speed, all processes together."""
    unreadable: tuple[str, ...]
    """Training images that could not be read and were replaced by others."""
    unreadable_evaluation: tuple[str, ...]
    """Evaluation images that could not be read and were left out."""
    unpatched: Evaluation | None
    """The unpatched model on the evaluation data, before training."""
    before: Evaluation | None
    """The patched model before training; agreement and KL are to the unpatched model before training."""
    after: Evaluation | None
    """The patched model after training; agreement and KL are to the unpatched model before training."""
    speed: Speed
    """Inference of the trained model, patched against unpatched, alternating."""
    training_speed: Speed
    """Forward and backward of the trained model, patched against unpatched, alternating."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        evaluations = {"unpatched": self.unpatched, "before": self.before, "after": self.after}
        return {
            **asdict(self),
            **{name: value and value.to_dict() for name, value in evaluations.items()},
        }
