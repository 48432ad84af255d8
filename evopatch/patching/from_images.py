"""What a patched model can learn from a few images in one pass, without labels: which, by its kind."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import EvoConfig
from ..errors import ConfigError, UnsupportedModelError
from .fitting import fit_foresight, is_flat
from .given_images import check_images
from .handle import Patched
from .window_correcting import fit_window_corrections

_LEAST_IMAGES = 8


def check_to_learn_from(images: Tensor, config: EvoConfig) -> None:
    """
    Raises:
        DataError: If these aren't images to learn from.
        ConfigError: If nothing would use what is learned.
    """
    check_images(images, least=_LEAST_IMAGES)
    if config.representative != "matched":
        raise ConfigError(
            f"images were given, and representative={config.representative!r}: what they are for, foresight and "
            "corrections, is for matched representatives only. Leave them out"
        )


def learn_from(model: nn.Module, images: Tensor) -> None:
    """Flat hosts learn foresight, those with windows a correction of what their fast tokens receive.

    Args:
        model: A patched model; what its blocks had before is replaced.
        images: `(B, 3, height, width)` as the model expects them, on its device; see `check_to_learn_from`.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If nothing in it can learn.
        DataError: If what the model makes of the images isn't finite, or it doesn't run on them.
    """
    hosts = Patched(model).hosts.values()
    flat, windowed = any(map(is_flat, hosts)), any(host.state.spec.windowed for host in hosts)
    if not flat and not windowed:
        raise UnsupportedModelError(
            f"{type(model).__name__}: foresight is for flat models, corrections are for them and for windows, and what "
            "is patched here pools its tokens on the way (LeViT, PiT). Leave the images out"
        )
    if flat:
        fit_foresight(model, images)
    if windowed:
        fit_window_corrections(model, images)
