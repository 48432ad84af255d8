"""Which way a model's maps lie."""

from __future__ import annotations

from torch import Tensor, nn


def channels_first(value: Tensor, model: nn.Module) -> Tensor:
    """What a model gave, maps of it as `(B, C, h, w)`.

    Args:
        value: Of a model that gives maps `(B, h, w, C)`, or `(B, C, h, w)`; what has other axes stays as it is.
        model: Of timm or transformers, or a wrapper of one.
    """
    return value.permute(0, 3, 1, 2) if value.dim() == 4 and _is_channels_last(model) else value


def _is_channels_last(model: nn.Module) -> bool:
    """timm's models, also those that give features alone, say so in `output_fmt`; all others have channels first."""
    if hasattr(model, "feature_info"):
        return bool(getattr(model, "output_fmt", "NCHW") == "NHWC")
    # A wrapper, such as transformers' for timm, hands on what its one child gives.
    children = list(model.children())
    return len(children) == 1 and _is_channels_last(children[0])
