"""Accuracy of a patched model, and how far its outputs moved from the unpatched ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EvoConfig
from ..errors import DataError, UnsupportedModelError
from ..patching.handle import Patched
from .kinds import Kind, divergence, kind_of, spread
from .profiling import UNPATCHED, profile


@dataclass(frozen=True)
class Evaluation:
    """One configuration on one data set. Accuracies and agreement in percent, KL in nats per image."""

    config: EvoConfig
    images: int
    outputs: Kind
    """What the model gives: `"classes"`, `"labels"` (several an image), `"numbers"` (regression), `"features"`."""
    top1: float | None
    """None where the data have no labels, and of other outputs than classes."""
    top5: float | None
    agreement: float | None
    """Share of the images whose predicted class is that of the model it is compared with, usually itself unpatched.
    None of other outputs than classes."""
    kl: float | None
    """Mean of KL(unpatched || patched), to the same; of labels summed over them. None of numbers and features."""
    difference: float | None
    """To the same, without a unit: of numbers the mean squared difference relative to their variance between images,
    mean over the numbers; of features one minus the cosine. None where there is a KL."""
    flops: float
    """Whole model, relative to unpatched."""
    blocks_flops: float
    """The blocks with their selections, relative to unpatched."""

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    configs: Sequence[EvoConfig],
    input_size: tuple[int, int, int],
    on_batch: Callable[[int], None] = lambda images: None,
    original: nn.Module | None = None,
) -> list[Evaluation]:
    """Run every configuration, and the unpatched model, on the same batches.

    Args:
        model: A patched classifier, or another model with one row of outputs per image; keeps its configuration and
            mode.
        batches: Of images `(B, 3, height, width)`, normalised, and labels `(B,)` or None: all with labels or none.
            Labels are numbers of classes, and left aside where the model's outputs are something else.
        configs: What to evaluate.
        input_size: `(3, height, width)`, to count the FLOPs for.
        on_batch: Called with the number of images after each batch.
        original: What to compare with instead of the model itself, unpatched: such as that model before training.

    Returns:
        One result per configuration, the unpatched (or original) model's before them.

    Raises:
        DataError: If there are no batches, only some have labels, a label is outside the model's classes, or the
            numbers of a regression are the same for all images.
    """
    configs = [UNPATCHED, *configs]
    patched = Patched(model)
    models = [patched.at(config) for config in configs]
    parameter = next(model.parameters())
    sums = torch.zeros(len(configs), 4, dtype=torch.float64)
    images, labelled, kind = 0, False, None
    numbers: list[Tensor] = []
    if original is not None:
        models[0] = original.to(parameter.device)
    for batch, labels in batches:
        if not len(batch):
            continue
        batch = batch.to(parameter.device, parameter.dtype)
        logits = [logits_of(own(batch)).float().cpu() for own in models]
        kind = kind_of(model, logits[0].shape[1])
        labels = labels if kind == "classes" else None
        if images and labelled != (labels is not None):
            raise DataError(
                f"images 0 to {images - 1} {_have(labelled)} and the next {len(batch)} {_have(not labelled)}: expected "
                "labels of all images or of none. Evaluate the two kinds apart"
            )
        labelled = labels is not None
        if labels is not None:
            _check_labels(labels, logits[0].shape[1], images)
        if kind == "numbers":
            numbers.append(torch.stack(logits))
        sums += torch.stack([_sums(kind, own, logits[0], labels) for own in logits])
        images += len(batch)
        on_batch(len(batch))
    if kind is None:
        raise DataError("no images to evaluate on")
    if kind == "numbers":
        every = torch.cat(numbers, 1) / spread(torch.cat(numbers, 1)[0])
        sums[:, 3] = torch.stack([divergence(kind, own, every[0]).double().sum() for own in every])
    flops = [profile(patched.at(config), input_size) for config in configs]
    return [
        Evaluation(
            config=config,
            images=images,
            outputs=kind,
            top1=100 * total[0].item() / images if labelled else None,
            top5=100 * total[1].item() / images if labelled else None,
            agreement=100 * total[2].item() / images if kind == "classes" else None,
            kl=total[3].item() / images if kind in ("classes", "labels") else None,
            difference=total[3].item() / images if kind in ("numbers", "features") else None,
            flops=counted.ratio,
            blocks_flops=counted.blocks_ratio,
        )
        for config, total, counted in zip(configs, sums, flops, strict=True)
    ]


def logits_of(output: Any) -> Tensor:
    """`(B, classes)`, of what a timm or a transformers classifier returns.

    Raises:
        UnsupportedModelError: If there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"logits {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        raise UnsupportedModelError(
            f"the model returns {found}: expected logits (B, classes), as a tensor or in the `logits` of an output, as "
            "classifiers of timm and transformers give them"
        )
    return logits


def _have(labelled: bool) -> str:
    return "have labels" if labelled else "have no labels"


def _check_labels(labels: Tensor, classes: int, before: int) -> None:
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"image {before + first} has the label {int(labels[first])}: expected 0 to {classes - 1}, as the model has "
            f"{classes} classes. Number the classes of the data as the model does"
        )


def _sums(kind: Kind, own: Tensor, whole: Tensor, labels: Tensor | None) -> Tensor:
    """Over the images: top-1, top-5, agreement, divergence; of other outputs than classes the last one alone."""
    apart = divergence(kind, own, whole).double().sum()
    if kind != "classes":
        return torch.stack([*torch.zeros(3, dtype=torch.float64), apart])
    top = own.topk(min(5, own.shape[1]), dim=1).indices
    hits = torch.zeros_like(top) if labels is None else top == labels.cpu().unsqueeze(1)
    agree = top[:, 0] == whole.argmax(1)
    return torch.stack([hits[:, 0].sum(), hits.sum(), agree.sum(), apart]).double()
