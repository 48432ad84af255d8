"""The head of a classifier of timm or transformers, and how many classes it has."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..rewrite.classes import host_class


def reset_head(model: Any, classes: int) -> None:
    """Give a classifier a new, random head for another number of classes, initialised as its library does.

    Args:
        model: Of timm or transformers.
        classes: How many, at least 1.

    Raises:
        UnsupportedModelError: If no layer of it goes by the number of classes; it is as it was then.
    """
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(classes)
        return
    for name, layer in _head(model, classes).items():
        model.set_submodule(name, layer)
    model.config.num_labels = classes
    model.config.problem_type = None  # that of the head which was there
    model.num_labels = classes


def count_classes(model: Any) -> int:
    """How many classes a classifier of timm or transformers has."""
    return int(model.num_classes if hasattr(model, "num_classes") else model.config.num_labels)


def class_names(model: Any) -> tuple[str, ...] | None:
    """Names of the classes of a classifier of timm or transformers, in their order; None unless its library's
    configuration has a name of its own for each."""
    classes = count_classes(model)
    cfg = getattr(model, "pretrained_cfg", None)
    names: Any = model.config.id2label if cfg is None else cfg.get("label_names")
    if isinstance(names, Mapping):  # of JSON, with numbers as text
        by_number = {int(number): name for number, name in names.items()}
        names = [by_number[number] for number in range(classes) if number in by_number]
    found = tuple(map(str, names or ()))
    # What transformers calls them where nobody did.
    unnamed = found == tuple(f"LABEL_{number}" for number in range(classes))
    return None if unnamed or len(set(found)) != classes or len(found) != classes else found


def set_class_names(model: Any, names: Sequence[str]) -> None:
    """Name the classes of a classifier where its library keeps such names, and saves them."""
    if (cfg := getattr(model, "pretrained_cfg", None)) is None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
        return
    # timm drops names when it saves a model of another number of classes than this.
    cfg |= {"label_names": list(names), "num_classes": len(names)}
    cfg.pop("label_descriptions", None)  # of the names that were there


def _head(model: Any, classes: int) -> dict[str, nn.Module]:
    """By name, new ones in place of the layers of a transformers model whose shapes go by the number of classes: a head
    may be any module, and there may be two."""
    built, other = _built(model, classes), _built(model, classes + 1)
    names = [name for name, layer in built.named_modules() if _shapes(layer) != _shapes(other.get_submodule(name))]
    own = dict(model.named_modules())
    if not names or not own.keys() >= set(names):
        found = f"has no '{sorted(set(names) - own.keys())[0]}'" if names else "has no layer of that size"
        raise UnsupportedModelError(
            f"{type(model).__name__} can't get a head for {classes} classes: it {found}. Expected an image classifier "
            "as transformers builds it; load it with num_labels, or give it the head yourself"
        )
    like = next(model.parameters())
    for name in names:
        built.get_submodule(name).to_empty(device=like.device).apply(_reset)
    # Of all layers, as some heads are initialised by what holds them; the rest has no memory.
    built.apply(built._init_weights)
    return {name: built.get_submodule(name).to(like.dtype).train(model.training) for name in names}


def _reset(layer: nn.Module) -> None:
    # For kinds of layers that transformers doesn't know.
    if callable(reset := getattr(layer, "reset_parameters", None)):
        reset()


def _built(model: Any, classes: int) -> Any:
    """The class anew, without weights."""
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    with torch.device("meta"):
        return host_class(model)(config)


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in layer.named_parameters(recurse=False)}
