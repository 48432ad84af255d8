"""Checkpoint folders of timm: `model.safetensors` and `config.json`, as on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

from evopatch.errors import CheckpointError
from evopatch.swap import host_class


def owns(model: nn.Module) -> bool:
    """Whether this library can save the model."""
    return hasattr(model, "pretrained_cfg") and host_class(model).__module__.startswith("timm.")


def save(model: nn.Module, folder: Path) -> None:
    """As `timm.create_model("local-dir:<folder>", pretrained=True)` reads it.

    Raises:
        CheckpointError: If timm would build another model from it.
    """
    save_for_hf(model, str(folder), safe_serialization=True)
    try:
        rebuilt: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False, device="meta")
    except Exception as error:
        raise CheckpointError(f"timm can't build {type(model).__name__} again from what it saves: {error}") from error
    here, there = _structure(model), _structure(rebuilt)
    different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"timm would build another model from what it saves: '{name}' is {here.get(name)} here and "
            f"{there.get(name)} there ({len(different)} differences). Make the model by timm.create_model with all its "
            "arguments, which timm records, instead of changing it afterwards"
        )


def load(folder: Path, **kwargs: Any) -> nn.Module:
    """The unpatched model.

    Raises:
        CheckpointError: If the folder holds none, or the weights don't fit.
    """
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)
    except Exception as error:
        raise CheckpointError(f"{folder} can't be loaded by timm: {error}") from error
    return model


def _structure(model: nn.Module) -> dict[str, object]:
    """Tensors' shapes, and modules' classes with their settings; dropout doesn't count."""
    found: dict[str, object] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        cls = host_class(module)
        if "Drop" not in cls.__name__ and cls is not nn.Identity:
            found[f"{name} (module)"] = (cls.__name__, module.extra_repr())
    return found
