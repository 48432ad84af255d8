"""What of a model's outputs is compared with another model's."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .kinds import Kind, kind_of
from .maps import channels_first

_NAMES = ("feature_maps", "last_hidden_state", "image_embeds", "reconstruction", "predicted_depth", "logits")


class Outputs(NamedTuple):
    """What of a model's outputs is compared."""

    kind: Kind
    values: tuple[Tensor, ...]
    """Of a head `(B, columns)`, or of one number per place `(B, T, 1)`; or features `(B, C)`, `(B, T, C)` or
    `(B, C, h, w)`; float32."""


def compared(output: Any, model: nn.Module) -> Outputs:
    """
    Args:
        output: What a model of timm or transformers returned.
        model: The model.

    Raises:
        UnsupportedModelError: If there is nothing known in it to compare.
    """
    logits = output if isinstance(output, Tensor) and output.dim() == 2 else getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() == 2:
        kind = kind_of(model, logits.shape[1])
        if kind != "features":
            return Outputs(kind, (logits.float(),))
    name = next((name for name in _NAMES if getattr(output, name, None) is not None), "")
    found: Any = getattr(output, name) if name else output
    if name == "predicted_depth" and found.dim() == 3:  # (B, height, width)
        found = found.unsqueeze(1)
    values = (found,) if isinstance(found, Tensor) else found
    kinds = isinstance(values, (tuple, list)) and all(isinstance(value, Tensor) for value in values)
    if not kinds or not values or any(value.dim() not in (2, 3, 4) for value in values):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns a {type(output).__name__}: expected logits, or features (B, C), "
            "(B, T, C) or (B, C, height, width). Give the part of the model that makes them"
        )
    # What heads make has channels first, however the encoder's maps lie.
    lie_alike = name in ("", "feature_maps", "last_hidden_state")
    features = tuple((channels_first(value, model) if lie_alike else value).float() for value in values)
    if len(features) == 1 and features[0].dim() == 4 and features[0].shape[1] == 1:
        # One number has no direction: its cosine is 1 whatever it is.
        return Outputs("numbers", (features[0].flatten(1).unsqueeze(2),))
    return Outputs("features", features)
