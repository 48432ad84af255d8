"""Classifiers by name for the command line, with their preprocessing: timm's names, and transformers' folders."""

from __future__ import annotations

import difflib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import Tensor, nn

from .errors import CheckpointError, ConfigError, UnsupportedModelError


class Classifier(NamedTuple):
    """A model in eval mode and what turns a PIL image into its input."""

    model: nn.Module
    transform: Callable[[Any], Tensor]
    input_size: tuple[int, int, int]
    """`(channels, height, width)`."""


class Preprocessing(NamedTuple):
    """What to change in the model's own preprocessing; None leaves it."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    image_size: int | None = None


_OWN = Preprocessing()


def open_classifier(
    name: str,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    preprocessing: Preprocessing = _OWN,
) -> Classifier:
    """A classifier with pretrained weights.

    Args:
        name: A timm name, also `hf-hub:owner/name` and `local-dir:folder`, a folder that transformers or timm (or
            `evopatch.save_pretrained`) wrote, or `owner/name` of a transformers model on the Hugging Face hub.
        checkpoint: For timm names: weights in timm's layout.
        num_classes: For a checkpoint with another head than the model's default.
        preprocessing: Changes to the model's own.

    Raises:
        UnsupportedModelError: If there is no such model; names similar ones.
        CheckpointError: If the weights are missing, unreadable, don't fit, or can't be downloaded.
        ConfigError: If an argument isn't for this kind of model.
    """
    library, source = _library_and_source(name)
    if library == "timm":
        with _no_retries():
            return _timm_classifier(source, checkpoint, num_classes, preprocessing)
    only_timm = {"--checkpoint": checkpoint, "--num-classes": num_classes, "--crop-pct": preprocessing.crop_pct}
    only_timm["--image-size"] = preprocessing.image_size
    if given := [option for option, value in only_timm.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: only for timm models; '{name}' is a transformers model with its own")
    with _no_retries():
        return _transformers_classifier(source, preprocessing)


@contextmanager
def _no_retries() -> Iterator[None]:
    """Where the hub's name can't be resolved, look in the cache only, instead of asking again for minutes."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _hub_is_known(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_is_known(endpoint: str) -> bool:
    if getproxies():
        return True  # a proxy resolves names by itself
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True


def _library_and_source(name: str) -> tuple[str, str]:
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
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        # Resampling by PIL, as models are trained and evaluated with; that of tensors differs by rounding.
        processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil")
        loaded: Any = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
    except Exception as error:
        raise CheckpointError(
            f"no image classifier could be loaded from '{name}': {_first_lines(error)}. Without network give "
            "a local folder with config.json, weights and preprocessor_config.json; with it, a name on its hub"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise CheckpointError(f"'{name}' holds no trained classifier: missing {sorted(info['missing_keys'])[:3]}")
    own = {"image_mean": preprocessing.mean, "image_std": preprocessing.std}
    changed = {key: list(value) for key, value in own.items() if value is not None}

    def transform(image: Any) -> Tensor:
        return cast(Tensor, processor(images=image, return_tensors="pt", **changed)["pixel_values"][0])

    from PIL import Image

    channels, height, width = transform(Image.new("RGB", (640, 480))).shape
    return Classifier(model.eval(), transform, (channels, height, width))


def _timm_classifier(
    name: str, checkpoint: Path | None, num_classes: int | None, preprocessing: Preprocessing
) -> Classifier:
    import timm
    import timm.data

    if ":" not in name and not timm.is_model(name):
        known = timm.list_models()
        similar = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "`evopatch list` shows the names."
        raise UnsupportedModelError(f"timm has no model named '{name}': {hint}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    model = _pretrained(name, options) if checkpoint is None else _from_file(name, checkpoint, options)
    override: dict[str, Any] = {k: v for k, v in preprocessing._asdict().items() if v is not None}
    if (size := override.pop("image_size", None)) is not None:
        cast(Any, model).set_input_size(img_size=(size, size))
        override["input_size"] = (3, size, size)
    data = timm.data.resolve_data_config(override, model=model, use_test_size=False)
    transform = timm.data.create_transform(**data, is_training=False)
    return Classifier(model.eval(), transform, tuple(data["input_size"]))


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
