"""Images that somebody gives: whether they are any, and whether a model runs on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, EvoPatchError


def check_images(images: Any, what: str = "images are", least: int = 1) -> None:
    """
    Args:
        images: What was given as images.
        what: The argument's name, and "is" or "are".
        least: So many are expected.

    Raises:
        DataError: If they are no tensor `(B, 3, height, width)`, or fewer.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or len(images) < least:
        number = f", at least {least} images" if least > 1 else ""
        raise DataError(f"{what} {_described(images)}: expected a tensor (B, 3, height, width){number}")


def run_on(model: nn.Module, images: Tensor, **model_inputs: Any) -> Any:
    """What a model returns for somebody's images.

    Args:
        model: Any that takes images.
        images: `(B, 3, height, width)`.
        **model_inputs: What else its forward takes.

    Raises:
        DataError: If the model raises anything of its own, as it does for images of another size, type or device.
    """
    try:
        return model(images, **model_inputs)
    except (EvoPatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever somebody's model raises
        raise DataError(
            f"{type(model).__name__} doesn't run on images {_described(images)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}. Expected images as the model takes them: of its size, in its type "
            "and on its device"
        ) from error


def _described(images: Any) -> str:
    if not isinstance(images, Tensor):
        return f"a {type(images).__name__}"
    return f"{tuple(images.shape)} {images.dtype} on {images.device}"
