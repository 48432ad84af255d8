"""Classifiers by name for the command line, with their preprocessing: timm's names, and transformers' folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..patching.weights import weights_only
from . import weight_files
from .hub import no_retries
from .model_names import check_timm_name, library_and_source
from .preprocessing import Preprocessing
from .sizes import set_size
from .weight_files import first_lines

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
    processor: Any = None
    """Of transformers: what makes the input, to be saved beside the model; models of timm save their own."""


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
        preprocessing: Changes to the model's own, which is then saved with it.
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

    local = Path(name).is_dir()
    try:
        with weights_only():
            model, info = load()
    except Exception as error:
        advice = (
            "Expected config.json and the weights that go with it: copy the folder, or save the model, again"
            if local
            else "Without network give a local folder with config.json, weights and preprocessor_config.json; with it, "
            "a name on its hub"
        )
        raise CheckpointError(f"no {kind} could be loaded from '{name}': {first_lines(error)}. {advice}") from error
    if info["missing_keys"]:
        raise CheckpointError(f"'{name}' holds no trained {kind}: missing {sorted(info['missing_keys'])[:3]}")
    try:
        # Resampling by PIL, as models are trained and evaluated with; that of tensors differs by rounding.
        processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil")
    except Exception as error:
        missing = local and not (Path(name) / "preprocessor_config.json").exists()
        found = "no image processor" if missing else f"no image processor that can be read ({first_lines(error)})"
        raise CheckpointError(
            f"'{name}' holds a model and {found}. Expected preprocessor_config.json beside its config.json: copy it "
            f"from where the model comes from, or write it by the processor's save_pretrained('{name}')"
        ) from error
    if preprocessing.mean is not None:
        processor.image_mean = list(preprocessing.mean)
    if preprocessing.std is not None:
        processor.image_std = list(preprocessing.std)

    def transform(image: Image) -> Tensor:
        return cast(Tensor, processor(images=image, return_tensors="pt")["pixel_values"][0])

    import PIL.Image

    channels, height, width = transform(PIL.Image.new("RGB", (640, 480))).shape
    normalises = getattr(processor, "do_normalize", True)
    return Classifier(
        model.eval(),
        transform,
        (channels, height, width),
        mean=tuple(processor.image_mean) if normalises else (0.0,) * 3,
        std=tuple(processor.image_std) if normalises else (1.0,) * 3,
        interpolation=PIL.Image.Resampling(
            getattr(processor, "resample", None) or PIL.Image.Resampling.BICUBIC
        ).name.lower(),
        processor=processor,
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
        model = weight_files.from_file(name, checkpoint, options)
    else:
        model = (
            weight_files.pretrained(name, options, instead)
            if pretrained
            else timm.create_model(name, pretrained=False, **options)
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
    _set_own(model, override)
    data = timm.data.resolve_data_config(model=model, use_test_size=False)
    transform = timm.data.create_transform(**data, is_training=False)
    size, mean, std = tuple(data["input_size"]), tuple(data["mean"]), tuple(data["std"])
    return Classifier(model.eval(), transform, size, mean, std, data["interpolation"])


def _set_own(model: Any, changes: dict[str, Any]) -> None:
    """Make changed preprocessing the model's own, which timm saves with it."""
    if changes:
        # What timm recommends for larger images at the end was for the weights' first preprocessing.
        outdated = {f"test_{name}" for name in changes} | ({"pool_size"} if "input_size" in changes else set())
        own = {name: value for name, value in model.pretrained_cfg.items() if name not in outdated}
        model.pretrained_cfg = model.default_cfg = {**own, **changes}


def _check_any_size(name: str) -> None:
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, dynamic_img_size=True)
    except TypeError as error:
        raise ConfigError(f"{name} takes images of one size only: give its pixels instead of dynamic") from error


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
