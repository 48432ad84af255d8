"""Accuracy of a patched model, and how far its predictions moved from the unpatched ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EvoConfig
from ..errors import DataError
from ..patching.handle import Patched
from .profiling import UNPATCHED, profile


@dataclass(frozen=True)
class Evaluation:
    """One configuration on one data set. Accuracies and agreement in percent, KL in nats per image."""

    config: EvoConfig
    images: int
    top1: float | None
    """None where the data have no labels."""
    top5: float | None
    agreement: float
    """Share of the images whose predicted class is that of the model it is compared with, usually itself unpatched."""
    kl: float
    """Mean of KL(unpatched || patched), to the same."""
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
        model: A patched classifier; keeps its configuration and mode.
        batches: Of images `(B, 3, height, width)`, normalised, and labels `(B,)` or None.
        configs: What to evaluate.
        input_size: `(3, height, width)`, to count the FLOPs for.
        on_batch: Called with the number of images after each batch.
        original: What to compare with instead of the model itself, unpatched: such as that model before training.

    Returns:
        One result per configuration, the unpatched (or original) model's before them.

    Raises:
        DataError: If there are no batches, or a label is outside the model's classes.
    """
    configs = [UNPATCHED, *configs]
    patched = Patched(model)
    models = [patched.at(config) for config in configs]
    parameter = next(model.parameters())
    sums = torch.zeros(len(configs), 4, dtype=torch.float64)
    images, labelled = 0, True
    if original is not None:
        models[0] = original.to(parameter.device)
    for batch, labels in batches:
        if not len(batch):
            continue
        batch = batch.to(parameter.device, parameter.dtype)
        logits = [logits_of(own(batch)).float().cpu() for own in models]
        labelled = labels is not None
        if labels is None:
            labels = torch.full((len(batch),), -1)
        else:
            _check_labels(labels, logits[0].shape[1], images)
        sums += torch.stack([_sums(own, logits[0], labels.cpu()) for own in logits])
        images += len(batch)
        on_batch(len(batch))
    if not images:
        raise DataError("no images to evaluate on")
    flops = [profile(patched.at(config), input_size) for config in configs]
    return [
        Evaluation(
            config=config,
            images=images,
            top1=100 * total[0].item() / images if labelled else None,
            top5=100 * total[1].item() / images if labelled else None,
            agreement=100 * total[2].item() / images,
            kl=total[3].item() / images,
            flops=counted.ratio,
            blocks_flops=counted.blocks_ratio,
        )
        for config, total, counted in zip(configs, sums, flops, strict=True)
    ]


def logits_of(output: Any) -> Tensor:
    """`(B, classes)`, of what a timm or a transformers classifier returns."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _check_labels(labels: Tensor, classes: int, before: int) -> None:
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"image {before + first} has the label {int(labels[first])}: expected 0 to {classes - 1}, as the model has "
            f"{classes} classes. Number the classes of the data as the model does"
        )


def _sums(logits: Tensor, unpatched: Tensor, labels: Tensor) -> Tensor:
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = top == labels.unsqueeze(1)
    agree = top[:, 0] == unpatched.argmax(1)
    kl = F.kl_div(logits.log_softmax(1), unpatched.log_softmax(1), reduction="sum", log_target=True)
    return torch.stack([hits[:, 0].sum(), hits.sum(), agree.sum(), kl]).double()
