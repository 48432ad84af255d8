"""What kind of outputs a head has, and how far those of two models are apart."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError

Kind = Literal["classes", "labels", "numbers", "features"]
"""`"classes"`: logits of classes of which an image has one. `"labels"`: logits of labels of which it may have several.
`"numbers"`: what a regression predicts. `"features"`: no head's."""


class Measure(NamedTuple):
    """How two models' outputs of one kind are compared."""

    short: str
    """For the head of a column."""
    text: str
    """With its unit."""


MEASURES: dict[Kind, Measure] = {
    "classes": Measure("KL", "KL to unpatched, nats"),
    "labels": Measure("KL", "KL to unpatched over labels, nats"),
    "numbers": Measure("MSE /\nvar", "squared difference / variance"),
    "features": Measure("1 - cosine", "1 - cosine to unpatched"),
}


def kind_of(model: nn.Module, columns: int) -> Kind:
    """The kind of outputs `(B, columns)`.

    transformers' `config.problem_type` says it. Where nothing does, one column is a number, as for transformers itself:
    a softmax over one class is always 1. timm's models say no more than that they have no head. A wrapper, such as
    `nn.DataParallel`, has what the one part in it says that has weights.
    """
    model = _speaker(model)
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        return "labels"
    if getattr(model, "num_classes", columns) == 0:  # pooled features of the same shape
        return "features"
    return "numbers" if problem == "regression" or columns < 2 else "classes"


def _speaker(model: nn.Module) -> nn.Module:
    """The outermost module that says anything."""
    while not hasattr(model, "config") and not hasattr(model, "num_classes"):
        parts = [child for child in model.children() if next(child.parameters(), None) is not None]
        if len(parts) != 1:
            break
        model = parts[0]
    return model


def divergence(kind: Kind, own: Tensor, whole: Tensor) -> Tensor:
    """`(B,)`, how far outputs `(B, columns)`, or numbers `(B, T, columns)` by place, are from the unpatched ones.

    KL(whole || own) in nats of classes, and of labels, summed over them; the squared difference of numbers, mean over
    the columns, in what units they have; one minus the cosine of features.
    """
    if kind == "classes":
        return F.kl_div(own.log_softmax(1), whole.log_softmax(1), reduction="none", log_target=True).sum(1)
    if kind == "labels":
        yes, no = (F.logsigmoid(sign * whole) - F.logsigmoid(sign * own) for sign in (1, -1))
        return (whole.sigmoid() * yes + (-whole).sigmoid() * no).sum(1)
    if kind == "numbers":
        return (own - whole).square().flatten(1).mean(1)
    return 1.0 - F.cosine_similarity(own, whole, dim=1)


def spread(numbers: Tensor) -> Tensor:
    """`(columns,)`, the standard deviation of numbers `(B, columns)` between images, or `(B, T, columns)` between their
    places: divided by it, they have no unit.

    Raises:
        DataError: If a column is the same for all images.
    """
    every = numbers.flatten(0, -2)
    found: Tensor = every.std(0, correction=0)
    same = (found <= 1e-6 * every.abs().amax(0)).nonzero().flatten().tolist()
    if same:
        raise DataError(
            f"output {same[0]} of the unpatched model is the same for all {len(numbers)} images: differences are "
            "measured by how much outputs differ between images. Give more images, or a model with a trained head"
        )
    return found
