"""Models by name for the command line: timm's own names, weights from the hub or from a file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

from torch import nn

from .errors import CheckpointError, UnsupportedModelError


def create_model(
    name: str, checkpoint: Path | None = None, num_classes: int | None = None, image_size: int | None = None
) -> nn.Module:
    """A timm model with pretrained weights, in eval mode.

    Args:
        name: As `timm.create_model` takes it, also `hf-hub:owner/name` and `local-dir:folder`.
        checkpoint: Weights in timm's layout (safetensors or a torch file); None: timm's pretrained weights.
        num_classes: Of a checkpoint with another head than the model's default.
        image_size: In pixels, if not the model's own; position embeddings are resized.

    Raises:
        UnsupportedModelError: If timm knows no such model; names similar ones.
        CheckpointError: If the weights are missing, unreadable, don't fit, or can't be downloaded.
    """
    import timm

    remote = ":" in name
    if not remote and not timm.is_model(name):
        known = timm.list_models()
        similar = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "`evopatch list` shows the names."
        raise UnsupportedModelError(f"timm has no model named '{name}': {hint}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    model = _pretrained(name, options) if checkpoint is None else _from_file(name, checkpoint, options)
    if image_size is not None:
        cast(Any, model).set_input_size(img_size=(image_size, image_size))
    return model.eval()


def _from_file(name: str, checkpoint: Path, options: dict[str, Any]) -> nn.Module:
    import timm

    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such file; expected weights for {name} in timm's layout")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        timm.models.load_checkpoint(model, str(checkpoint))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} doesn't fit {name}: {_first_lines(error)}. Expected a state dict in timm's layout for this "
            "model; a head with another number of classes needs --num-classes"
        ) from error
    return model


def _pretrained(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise CheckpointError(
            f"no pretrained weights for {name} could be had: {_first_lines(error)}. Without network give a file with "
            "--checkpoint"
        ) from error
    return model


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[:3])[:400]
