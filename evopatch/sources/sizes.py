"""Images of another size than a model of timm was made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def set_size(model: nn.Module, size: int) -> bool:
    """Make a model of timm one for square images of so many pixels.

    Args:
        model: To be changed; one that takes any size is not.
        size: Pixels a side.

    Returns:
        Whether it is one now. False: its positions are for its own size.

    Raises:
        Exception: Whatever the model raises where it can't be.
    """
    own: Any = model
    if hasattr(model, "set_input_size"):
        own.set_input_size(img_size=(size, size))
        return True
    if own.pretrained_cfg.get("fixed_input_size", True):
        return False
    parameter = next(model.parameters())
    with torch.no_grad():
        own.forward_features(parameter.new_zeros(1, own.pretrained_cfg["input_size"][0], size, size))
    return True
