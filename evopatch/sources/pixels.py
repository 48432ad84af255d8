"""Pixels of any image file as models take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def as_rgb(image: Image) -> Image:
    """An image of 8 bits in three channels. Its EXIF orientation is left alone, as by timm's and torchvision's loaders.

    PIL itself cuts off what is above 255 in 16 bits, so that most such images would be white.
    """
    import numpy as np
    import PIL.Image

    # Pillow before 10.3 opens such files as 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        image = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("RGB")
