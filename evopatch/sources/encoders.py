"""Models by name for their features: classifiers, and models without a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .hub import no_retries
from .model_names import library_and_source
from .models import Classifier, open_classifier, transformers_model
from .preprocessing import Preprocessing


def open_encoder(
    name: str,
    checkpoint: Path | None,
    num_classes: int | None,
    preprocessing: Preprocessing,
    pretrained: bool = True,
    any_size: bool = False,
    instead: str = "",
) -> Classifier:
    """A model with pretrained weights: of transformers the class that its configuration names, with a head or without.

    Arguments and errors as for `open_classifier`.
    """
    library, source = library_and_source(name)
    if library == "timm":
        return open_classifier(name, checkpoint, num_classes, preprocessing, pretrained, any_size, instead)
    given: dict[str, Any] = {"--checkpoint": checkpoint, "--num-classes": num_classes}
    given |= {"--crop-pct": preprocessing.crop_pct, "--image-size": preprocessing.image_size}
    given["--no-pretrained"] = None if pretrained else False
    if unused := [option for option, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(unused)}: only for timm models; '{name}' is a transformers model with its own")
    with no_retries():
        return transformers_model(source, preprocessing, lambda: _load(source), "model")


def _load(name: str) -> tuple[Any, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    # AutoModel would leave out a head, and with it the names that a patched model was saved by, and add random poolers.
    classes = [getattr(transformers, own, None) for own in config.architectures or ()]
    cls: Any = next((own for own in classes if own is not None), transformers.AutoModel)
    found: tuple[Any, Any] = cls.from_pretrained(name, output_loading_info=True)
    return found
