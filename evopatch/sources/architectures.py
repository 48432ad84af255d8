"""Classifiers by name with random weights: to count and to time, without network."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import CheckpointError, ConfigError
from .hub import no_retries
from .model_names import check_timm_name, library_and_source
from .sizes import set_size
from .weight_files import first_lines


def open_architecture(name: str, image_size: int | None = None) -> tuple[nn.Module, tuple[int, int, int]]:
    """A classifier with random weights, in eval mode, and its input's `(channels, height, width)`.

    Args:
        name: As for `open_classifier`.
        image_size: In pixels. None: the model's own.

    Raises:
        UnsupportedModelError: If there is no such model; names similar ones.
        CheckpointError: If its configuration is missing or can't be downloaded.
        ConfigError: If the image size doesn't suit it.
    """
    library, source = library_and_source(name)
    with no_retries():
        if library == "timm":
            return _timm_architecture(source, image_size)
        from transformers import AutoConfig, AutoModelForImageClassification

        try:
            config: Any = AutoConfig.from_pretrained(source)
            if image_size is not None:
                config.image_size = image_size
            model = AutoModelForImageClassification.from_config(config)
        except Exception as error:
            raise CheckpointError(f"no image classifier could be made from '{name}': {first_lines(error)}") from error
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return model.eval(), (config.num_channels, height, width)


def _timm_architecture(name: str, image_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    import timm
    import timm.data

    check_timm_name(name)
    try:
        model: Any = timm.create_model(name)
        if image_size is not None and not set_size(model.eval(), image_size):
            model = timm.create_model(name, img_size=image_size)
    except Exception as error:
        raise ConfigError(f"{name} can't be made for images of {image_size} px: {first_lines(error)}") from error
    channels, height, width = timm.data.resolve_data_config(model=model, use_test_size=False)["input_size"]
    return model.eval(), (channels, image_size or height, image_size or width)
