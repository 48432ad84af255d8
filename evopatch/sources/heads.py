"""The head of a classifier of timm or transformers, and how many classes it has."""

from __future__ import annotations

from typing import Any

from torch import nn


def reset_head(model: Any, classes: int) -> None:
    """Give a classifier a new, random head for another number of classes."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(classes)
        return
    for name in ("classifier", "cls_classifier", "distillation_classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            setattr(model, name, nn.Linear(head.in_features, classes))
    model.config.num_labels = classes
    model.num_labels = classes


def count_classes(model: Any) -> int:
    """How many classes a classifier of timm or transformers has."""
    return int(model.num_classes if hasattr(model, "num_classes") else model.config.num_labels)
