"""Checkpoint folders of timm: `model.safetensors` and `config.json`, as on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import nn

from evopatch.errors import CheckpointError
from evopatch.patching.library import Origin, hub_name
from evopatch.patching.rebuilt import check_rebuilt
from evopatch.patching.registry import too_old
from evopatch.patching.weights import weights_only
from evopatch.rewrite.classes import host_class

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_LEAST = "1.0.26"
"""Older ones can't read a folder with safetensors."""


def _check_version() -> None:
    if text := too_old("timm", _LEAST):
        raise CheckpointError(f"models of timm can't be saved and loaded by it: {text}")


def owns(model: nn.Module) -> bool:
    """Whether this library can save the model."""
    return hasattr(model, "pretrained_cfg") and host_class(model).__module__.startswith("timm.")


def save(model: nn.Module, folder: Path) -> None:
    """As `timm.create_model("local-dir:<folder>", pretrained=True)` reads it.

    Raises:
        CheckpointError: If timm would build another model from it, or is too old.
    """
    _check_version()
    try:
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
        rebuilt: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False, device="meta")
    except Exception as error:
        reason = str(error).rstrip(". ")
        raise CheckpointError(
            f"timm can't build {type(model).__name__} again from what it saves: {reason}. Make the model by "
            "timm.create_model with arguments that JSON can hold, such as a layer's name instead of its class"
        ) from error
    advice = "Make the model by timm.create_model with all its arguments, which timm records"
    check_rebuilt(model, rebuilt, advice)


def preprocessing(model: nn.Module) -> list[Path]:
    """None: it is in `config.json`, from the model's `pretrained_cfg`."""
    return []


def save_processor(processor: Any, folder: Path) -> None:
    """
    Raises:
        CheckpointError: Always, as timm has none.
    """
    raise CheckpointError(
        f"processor={type(processor).__name__}: only for models of transformers. Those of timm save the preprocessing "
        "in their pretrained_cfg; change that"
    )


def load(folder: Path, **kwargs: Any) -> nn.Module:
    """The unpatched model, of the floating-point type it was saved in unless `dtype` says otherwise.

    Raises:
        CheckpointError: If the folder holds none, the weights don't fit, or timm is too old.
    """
    _check_version()
    try:
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            names = tensors.keys()
            types = {_DTYPES.get(tensors.get_slice(name).get_dtype()) for name in names} - {None}
        if len(types) == 1:
            kwargs.setdefault("dtype", types.pop())
        with weights_only():
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)
    except Exception as error:
        raise CheckpointError(f"{folder} can't be loaded by timm: {error}") from error
    return model


def origin(model: Any) -> Origin:
    """What a model card says of the model."""
    cfg = model.pretrained_cfg
    channels, *size = cfg["input_size"]
    # A model may be made for other images than its weights; most have that on record.
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    stock = 'timm.create_model("local-dir:folder", pretrained=True)'
    return Origin(hub_name(cfg.get("hf_hub_id")), (channels, height, width), stock)
