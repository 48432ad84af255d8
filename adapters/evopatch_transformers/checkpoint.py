"""Checkpoint folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from evopatch.errors import CheckpointError
from evopatch.patching.library import Origin, hub_name
from evopatch.patching.rebuilt import check_rebuilt
from evopatch.patching.weights import weights_only


def owns(model: nn.Module) -> bool:
    """Whether this library can save the model."""
    return isinstance(model, PreTrainedModel)


def save(model: Any, folder: Path) -> None:
    """As `from_pretrained` reads it.

    Raises:
        CheckpointError: If transformers would build another model from it.
    """
    cls = type(model)
    if getattr(transformers, cls.__name__, None) is not cls:
        raise CheckpointError(
            f"{cls.__name__} ({cls.__module__}) is no class of transformers, which builds a saved model by its class's "
            "name: save the part that is one, or model.state_dict()"
        )
    model.save_pretrained(folder)
    with torch.device("meta"):
        rebuilt = cls(AutoConfig.from_pretrained(folder))
    check_rebuilt(model, rebuilt, "Make such changes through the model's config")


def preprocessing(model: Any) -> list[Path]:
    """The image processor's files where the model was loaded from: a folder, or what the hub's cache has of it."""
    found = []
    for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME):
        try:
            file = cached_file(model.name_or_path, name, local_files_only=True) if model.name_or_path else None
        except (OSError, ValueError):  # no such file there, or no such place any more
            continue
        found += [] if file is None else [Path(file)]
    return found


def save_processor(processor: Any, folder: Path) -> None:
    """As `AutoImageProcessor.from_pretrained` reads it."""
    processor.save_pretrained(folder)


def load(folder: Path, **kwargs: Any) -> nn.Module:
    """The unpatched model, of the class that saved it.

    Raises:
        CheckpointError: If the folder's config names no class of transformers, or the weights don't fit.
    """
    try:
        names = AutoConfig.from_pretrained(folder).architectures or []
        cls = getattr(transformers, names[0]) if names else None
    except Exception as error:
        raise CheckpointError(f"{folder} holds no checkpoint of transformers: {error}") from error
    if cls is None:
        raise CheckpointError(f"{folder}: its config.json names no class of transformers under 'architectures'")
    try:
        with weights_only():
            model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    except Exception as error:
        raise CheckpointError(f"{folder} can't be loaded into {cls.__name__}: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{folder}: weights for {cls.__name__} are missing: {missing[:3]} ({len(missing)} in all)"
        )
    loaded: nn.Module = model
    return loaded


def origin(model: Any) -> Origin:
    """What a model card says of the model."""
    config = model.config
    vision = next(
        (getattr(config, part) for part in ("vision_config", "backbone_config", "encoder") if hasattr(config, part)),
        config,
    )
    size = getattr(vision, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else size or (None, None)
    channels = getattr(vision, "num_channels", 3)
    input_size = None if height is None or width is None else (channels, height, width)
    return Origin(
        hub_name(model.name_or_path), input_size, f'transformers.{type(model).__name__}.from_pretrained("folder")'
    )
