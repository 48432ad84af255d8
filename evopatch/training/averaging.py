"""The exponential moving average of a model's weights."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import nn


class Average:
    """timm's, repeatable when a run is resumed.

    Args:
        model: Whose weights.
        decay: Share that stays at a step; less at the first ones.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self.state = ModelEmaV3(model, decay=decay, use_warmup=True)
        """Part of a run's checkpoints."""

    def update(self, step: int) -> None:
        """Take the weights after so many optimizer steps in."""
        if (generator := getattr(self.state, "_sr_generator", None)) is not None:
            generator.manual_seed(step)  # of its rounding; isn't part of its state
        self.state.update(self._model, step)

    def give(self) -> None:
        """Give the model the average as its weights."""
        self._model.load_state_dict(self.state.module.state_dict())
