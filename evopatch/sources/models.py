"""Classifiers by name for the command line, with their preprocessing: timm's names, and transformers' folders."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..patching.weights import foreign_code, weights_only
from .hub import no_retries
from .preprocessing import Preprocessing
from .sizes import set_size

if TYPE_CHECKING:
    from PIL.Image import Image


class Classifier(NamedTuple):
    """A model in eval mode and what turns a PIL image into its input."""

    model: nn.Module
    transform: Callable[[Image], Tensor]
    input_size: tuple[int, int, int]
    """`(channels, height, width)`."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    """How images are resized: `"bicubic"`, `"bilinear"` ..."""


_OWN = Preprocessing()


def open_classifier(
    name: str,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    preprocessing: Preprocessing = _OWN,
    pretrained: bool = True,
    any_size: bool = False,
    instead: str = "",
) -> Classifier:
    """A classifier with pretrained weights.

    Args:
        name: A timm name, also `hf-hub:owner/name` and `local-dir:folder`, a folder that transformers or timm (or
            `evopatch.save_pretrained`) wrote, or `owner/name` of a transformers model on the Hugging Face hub.
        checkpoint: For timm names: weights in timm's layout.
        num_classes: For a checkpoint with another head than the model's default.
        preprocessing: Changes to the model's own.
        pretrained: False for random weights, of a timm model.
        any_size: Of a timm model: create it for images of any size.
        instead: What else the caller takes where pretrained weights can't be had, for the end of that message.

    Raises:
        UnsupportedModelError: If there is no such model; names similar ones.
        CheckpointError: If the weights are missing, unreadable, don't fit, or can't be downloaded.
        ConfigError: If an argument isn't for this kind of model.
    """
    library, source = library_and_source(name)
    if library == "timm":
        with no_retries():
            return _timm_classifier(source, checkpoint, num_classes, preprocessing, pretrained, any_size, instead)
    only_timm: dict[str, Any] = {
        "--checkpoint": checkpoint,
        "--num-classes": num_classes,
        "--crop-pct": preprocessing.crop_pct,
    }
    only_timm |= {"--image-size": preprocessing.image_size, "--no-pretrained": None if pretrained else False}
    if given := [option for option, value in only_timm.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: only for timm models; '{name}' is a transformers model with its own")
    with no_retries():
        return _transformers_classifier(source, preprocessing)


def library_and_source(name: str) -> tuple[str, str]:
    """Which library a name is for, and what that library calls it.

    Raises:
        CheckpointError: If it is a folder of neither.
    """
    config = Path(name) / "config.json"
    if config.is_file():
        try:
            values = json.loads(config.read_text())
        except ValueError as error:
            raise CheckpointError(f"{config} is damaged or no JSON: {error}") from error
        return ("timm", f"local-dir:{name}") if "architecture" in values else ("transformers", name)
    if Path(name).is_dir():
        raise CheckpointError(f"{name} is a folder without config.json: expected one that transformers or timm wrote")
    return "transformers" if "/" in name and ":" not in name else "timm", name


def _transformers_classifier(name: str, preprocessing: Preprocessing) -> Classifier:
    from transformers import AutoModelForImageClassification

    def load() -> Any:
        return AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)

    return transformers_model(name, preprocessing, load, "image classifier")


def transformers_model(name: str, preprocessing: Preprocessing, load: Callable[[], Any], kind: str) -> Classifier:
    """A model of transformers with its own preprocessing.

    Args:
        name: Of its folder or repository.
        preprocessing: Changes to the model's own.
        load: Gives the model and transformers' loading info.
        kind: What messages call it.

    Raises:
        CheckpointError: If there is none, or weights are missing.
    """
    from transformers import AutoImageProcessor

    try:
        # Resampling by PIL, as models are trained and evaluated with; that of tensors differs by rounding.
        processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil")
        with weights_only():
            model, info = load()
    except Exception as error:
        raise CheckpointError(
            f"no {kind} could be loaded from '{name}': {first_lines(error)}. Without network give "
            "a local folder with config.json, weights and preprocessor_config.json; with it, a name on its hub"
        ) from error
    if info["missing_keys"]:
        raise CheckpointError(f"'{name}' holds no trained {kind}: missing {sorted(info['missing_keys'])[:3]}")
    own = {"image_mean": preprocessing.mean, "image_std": preprocessing.std}
    changed = {key: list(value) for key, value in own.items() if value is not None}

    def transform(image: Image) -> Tensor:
        return cast(Tensor, processor(images=image, return_tensors="pt", **changed)["pixel_values"][0])

    import PIL.Image

    channels, height, width = transform(PIL.Image.new("RGB", (640, 480))).shape
    normalises = getattr(processor, "do_normalize", True)
    return Classifier(
        model.eval(),
        transform,
        (channels, height, width),
        mean=preprocessing.mean or (tuple(processor.image_mean) if normalises else (0.0,) * 3),
        std=preprocessing.std or (tuple(processor.image_std) if normalises else (1.0,) * 3),
        interpolation=PIL.Image.Resampling(
            getattr(processor, "resample", None) or PIL.Image.Resampling.BICUBIC
        ).name.lower(),
    )


def _timm_classifier(
    name: str,
    checkpoint: Path | None,
    num_classes: int | None,
    preprocessing: Preprocessing,
    pretrained: bool,
    any_size: bool,
    instead: str,
) -> Classifier:
    import timm
    import timm.data

    check_timm_name(name)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if any_size:
        _check_any_size(name)
        options["dynamic_img_size"] = True
    if checkpoint is not None:
        model = _from_file(name, checkpoint, options)
    else:
        model = (
            _pretrained(name, options, instead) if pretrained else timm.create_model(name, pretrained=False, **options)
        )
    override: dict[str, Any] = {k: v for k, v in preprocessing._asdict().items() if v is not None}
    if (size := override.pop("image_size", None)) is not None:
        try:
            fits = set_size(model.eval(), size)
        except Exception as error:
            raise ConfigError(f"{name} can't be made for images of {size} px: {first_lines(error)}") from error
        if not fits:
            own = cast(Any, model).pretrained_cfg["input_size"][-1]
            raise ConfigError(
                f"--image-size {size}: the weights of {name} are for images of {own} px only, as its positions don't "
                "interpolate; leave it out"
            )
        override["input_size"] = (3, size, size)
    data = timm.data.resolve_data_config(override, model=model, use_test_size=False)
    transform = timm.data.create_transform(**data, is_training=False)
    size, mean, std = tuple(data["input_size"]), tuple(data["mean"]), tuple(data["std"])
    return Classifier(model.eval(), transform, size, mean, std, data["interpolation"])


def _check_any_size(name: str) -> None:
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, dynamic_img_size=True)
    except TypeError as error:
        raise ConfigError(f"{name} takes images of one size only: give its pixels instead of dynamic") from error


def check_timm_name(name: str) -> None:
    """
    Raises:
        UnsupportedModelError: If timm has no such model; names similar ones.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        known = timm.list_models()
        similar = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "`evopatch list` shows the names."
        raise UnsupportedModelError(f"timm has no model named '{name}': {hint}")


class Renormalised(nn.Module):
    """A classifier behind another one's normalisation.

    Args:
        classifier: The one to run.
        mean: What its input was normalised with.
        std: The same.
    """

    def __init__(self, classifier: Classifier, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = classifier.model.requires_grad_(False)
        # x * std + mean are pixels again; both steps as one.
        scale = torch.tensor(std) / torch.tensor(classifier.std)
        shift = (torch.tensor(mean) - torch.tensor(classifier.mean)) / torch.tensor(classifier.std)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale.view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Any:
        """`(B, 3, height, width)`."""
        return self.model(images * self.scale + self.shift)


def _from_file(name: str, checkpoint: Path, options: dict[str, Any]) -> nn.Module:
    import timm

    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such file; expected weights for {name} in timm's layout")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        with weights_only():
            timm.models.load_checkpoint(model, str(checkpoint))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} doesn't fit {name}: {first_lines(error)}. Expected a state dict in timm's layout for this "
            f"model; a head with another number of classes needs --num-classes{foreign_code(checkpoint)}"
        ) from error
    return model


def _pretrained(name: str, options: dict[str, Any], instead: str) -> nn.Module:
    import timm

    try:
        with weights_only():
            model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise CheckpointError(
            f"no pretrained weights for {name} could be had: {first_lines(error)}. Without network give a file with "
            f"--checkpoint{instead}"
        ) from error
    return model


def first_lines(error: BaseException) -> str:
    """What goes into a message of a library's error, without a full stop."""
    return " ".join(str(error).split("\n")[:3])[:400].rstrip(". ")


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
        raise CheckpointError(f"{file} holds no weights: {first_lines(error)}{foreign_code(file)}") from error
    return state
