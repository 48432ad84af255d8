"""Training transforms: timm's, with the model's own normalisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..errors import ConfigError
from .models import Classifier

if TYPE_CHECKING:
    from PIL.Image import Image


class Augmentation(NamedTuple):
    """What is done to training images; names and meaning are timm's."""

    scale: tuple[float, float] = (0.35, 1.0)
    """Share of the image's area that a random crop covers, smallest and largest."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    color_jitter: float | None = None
    auto_augment: str | None = None
    """Such as `"rand-m9-mstd0.5-inc1"`."""
    random_erasing: float = 0.0
    """Probability."""


def training_transform(classifier: Classifier, augmentation: Augmentation) -> Callable[[Image], Tensor]:
    """From a PIL image to an augmented, normalised `(3, height, width)`.

    Raises:
        ConfigError: If timm doesn't know the policy.
    """
    from timm.data import create_transform

    try:
        transform: Callable[[Image], Tensor] = create_transform(
            classifier.input_size,
            is_training=True,
            scale=augmentation.scale,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            re_prob=augmentation.random_erasing,
            interpolation=classifier.interpolation,
            mean=classifier.mean,
            std=classifier.std,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(f"{augmentation}: timm can't make a transform of it: {error}") from error
    _keep_a_bit(transform)
    return transform


def _keep_a_bit(transform: Any) -> None:
    # At full strength timm's policies posterize to 0 bits, a black image, which Pillow refuses since version 13.
    for policy in transform.transforms:
        for op in getattr(policy, "ops", None) or chain.from_iterable(getattr(policy, "policy", ())):
            if op.name.startswith("Posterize"):
                op.aug_fn = partial(_posterize, op.aug_fn)


def _posterize(function: Callable[..., Any], image: Image, bits: int, **kwargs: Any) -> Any:
    return function(image, max(bits, 1), **kwargs)
