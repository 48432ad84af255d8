"""What a run of `embed` is told from others by: features of two are not put into one file."""

from __future__ import annotations

import hashlib
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from ..measure.fingerprint import fingerprint
from ..patching.learning import learned
from ..sources.dataset import Images, Transform


def digest_of_weights(model: nn.Module) -> str:
    """Of all that a patched model holds, what it learned from images included."""
    return fingerprint(model.state_dict() | learned(model))


def digest_of_images(images: Images) -> str:
    """Of their names and stamps."""
    # Not of their contents: a data set may be too large to be read twice.
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(f"{images.name(index)}\0{images.stamp(index)}\0".encode())
    return f"{len(images)}, {digest.hexdigest()[:16]}"


def digest_of_settings(model: nn.Module) -> str:
    """Of what a model of timm or transformers computes with its weights, beside its modules."""
    inner: Any = getattr(model, "timm_model", model)  # in transformers' wrapper
    settings = {"global_pool": getattr(inner, "global_pool", None)}
    if hasattr(inner, "config"):
        settings |= inner.config.to_dict()
    settings.pop("_name_or_path", None)  # one model at two places
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]


def digest_of_transform(transform: Transform | None) -> str:
    """Of what it makes of one image."""
    if transform is None:
        return "none"
    gradient = PIL.Image.linear_gradient("L")
    image = PIL.Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).resize((240, 200))
    try:
        made = [transform(image) for _ in range(2)]
    except Exception as error:  # it may be for other images
        return type(error).__name__
    if not all(isinstance(each, Tensor) for each in made):
        return type(made[0]).__name__
    return fingerprint({"image": made[0]}) if torch.equal(*made) else "random"
