"""Weights of timm models, from a file, a folder or the hub, and what is said where there are none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..patching.weights import foreign_code, weights_only

_FOLDER = "local-dir:"
_ARRAYS = (".npz", ".npy")
"""Files of JAX models, which timm reads by the model that they are for."""


def from_file(name: str, checkpoint: Path, options: dict[str, Any]) -> nn.Module:
    """A model with the weights in a file.

    Raises:
        CheckpointError: If there are none, or they don't fit the model.
    """
    import timm

    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such file; expected weights for {name} in timm's layout")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        with weights_only():
            timm.models.load_checkpoint(model, str(checkpoint))
    except Exception as error:
        if checkpoint.suffix not in _ARRAYS:
            read_state(checkpoint)  # where the file itself is at fault, this says so
        raise CheckpointError(
            f"{checkpoint} doesn't fit {name}: {first_lines(error)}. Expected a state dict in timm's layout for this "
            "model; a head with another number of classes needs --num-classes"
        ) from error
    return model


def pretrained(name: str, options: dict[str, Any], instead: str) -> nn.Module:
    """A model with timm's weights, or those of its folder. Arguments as for `open_classifier`.

    Raises:
        CheckpointError: If they can't be had.
        ConfigError: If they have a head for another number of classes than the options say.
    """
    import timm

    try:
        with weights_only():
            model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        if name.startswith(_FOLDER):
            raise CheckpointError(
                f"{name.removeprefix(_FOLDER)} holds no whole model of timm: {first_lines(error)}. Expected "
                "config.json and the weights that go with it: copy the folder, or save the model, again"
            ) from error
        raise CheckpointError(
            f"no pretrained weights for {name} could be had: {first_lines(error)}. Without network give a file with "
            f"--checkpoint{instead}"
        ) from error
    wanted, classes = options.get("num_classes"), cast(Any, model).pretrained_cfg.get("num_classes")
    if wanted is not None and wanted != classes:
        raise ConfigError(
            f"--num-classes {wanted}: the weights of {name.removeprefix(_FOLDER)} have a head for {classes}, in place "
            "of which there would be a random one. Leave it out; it is for a --checkpoint, or --no-pretrained"
        )
    return model


def read_state(file: Path) -> dict[str, Tensor]:
    """A state dict in a file that timm reads: `.safetensors`, or one of `torch.save`.

    Raises:
        CheckpointError: If there is none in it.
    """
    import timm.models

    try:
        with weights_only():
            state: dict[str, Tensor] = timm.models.load_state_dict(str(file), use_ema=False)
    except Exception as error:
        if code := foreign_code(file):
            raise CheckpointError(f"{file} holds more than weights{code}") from error
        # What pickle stumbles over says nothing of the file, and torch's advice is to run what is in it.
        told = not isinstance(error.__cause__ or error, (pickle.UnpicklingError, LookupError, EOFError))
        reason = f": {first_lines(error)}" if told else ""
        raise CheckpointError(
            f"{file} is damaged, or no file of weights{reason}. Expected a state dict, of safetensors or torch.save: "
            "if it should be one, copy it again"
        ) from error
    return state


def first_lines(error: BaseException) -> str:
    """What goes into a message of a library's error, without a full stop."""
    return " ".join(str(error).split("\n")[:3])[:400].rstrip(". ")
