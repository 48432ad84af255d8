"""One optimizer step: its forwards and backwards, and the change of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn

from ..measure.accuracy import logits_of
from .averaging import Average
from .items import Batch
from .objective import Objective, hits
from .randomness import seed_everything
from .reporting import Figures, Report
from .state import Progress

SKIPPED_LIMIT = 20
"""Optimizer steps in a row without a finite gradient, in fp16; each halves the scale of the loss."""


class Optimization:
    """Changes the weights of a student, batch by batch.

    Args:
        accelerator: What prepared student and optimizer.
        student: The model with the heads that only training needs.
        optimizer: Of its parameters.
        scheduler: timm's, by optimizer steps.
        objective: What it is trained for.
        teacher: Whose predictions it learns, if any.
        mixup: Of images and labels.
        average: Of the weights.
        progress: Counts the steps.
        report: Gets what comes of them.
        seed: Of the random numbers of every forward.
        gradient_clip: Largest norm of the gradient.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        optimizer: Any,
        scheduler: Any,
        objective: Objective,
        teacher: nn.Module | None,
        mixup: Mixup | None,
        average: Average | None,
        progress: Progress,
        report: Report,
        seed: int,
        gradient_clip: float,
    ) -> None:
        self._accelerator, self._student, self._optimizer, self._scheduler = accelerator, student, optimizer, scheduler
        self._objective, self._teacher, self._mixup = objective, teacher, mixup
        self._average, self._progress, self._report = average, progress, report
        self._seed, self._gradient_clip = seed, gradient_clip
        self._sums: dict[str, Tensor] = {}
        self._skipped = 0

    def forward_backward(self, batch: Batch, forward: int, scale: float) -> None:
        """One forward and backward.

        Args:
            batch: On the accelerator's device.
            forward: Its number in this step.
            scale: Factor on the loss.
        """
        images, labels, _ = batch
        # Dropout of this forward: a function of the seed and the place, so that a resumed run repeats it.
        seed_everything(self._seed, self._progress.step, forward, self._accelerator.process_index)
        targets = labels if self._objective.uses_labels else None
        if self._mixup is not None:
            any_label = torch.zeros(len(images), dtype=torch.long, device=images.device)
            images, mixed = self._mixup(images, any_label if targets is None else targets)
            targets = None if targets is None else mixed
        teacher = self._taught(images)
        outputs = self._student(images)
        terms = self._objective.terms(outputs, targets, teacher)
        self._accelerator.backward(torch.stack(list(terms.values())).sum() * scale)
        found = {name: term.detach() for name, term in terms.items()}
        found |= {
            "hits": hits(outputs, targets, teacher),
            "forwards": images.new_ones(()),
            "images": images.new_tensor(len(images)),
        }
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._accelerator.device)) + value

    def _taught(self, images: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        with torch.no_grad(), self._accelerator.autocast():
            return logits_of(self._teacher(images.to(next(self._teacher.parameters()).dtype)))

    def step(self, epoch: int, stop: bool) -> tuple[Figures, bool]:
        """Change the weights by the gradients of the forwards since the last step.

        Args:
            epoch: Counted from 0, for messages.
            stop: Whether this process was asked to stop.

        Returns:
            What came of it, and whether any process was asked to stop.

        Raises:
            TrainingError: If loss or gradient are no finite numbers; the weights are those from before the step.
        """
        figures, stops = self._figures(stop)
        gradient = f"norm of the gradient of the {' + '.join(figures.losses)}"
        # A scaler leaves out steps whose gradient overflows, and scales less after each of them.
        scaled = self._accelerator.scaler is not None
        checked = figures.losses if scaled else {**figures.losses, gradient: figures.gradient_norm}
        for name, value in checked.items():
            if not math.isfinite(value):
                self._fail(name, value, epoch, figures.learning_rate)
        self._optimizer.step()
        self._skipped = self._skipped + 1 if self._accelerator.optimizer_step_was_skipped else 0
        if self._skipped == SKIPPED_LIMIT:
            self._fail(gradient, figures.gradient_norm, epoch, figures.learning_rate)
        self._optimizer.zero_grad()
        self._progress.step += 1
        self._scheduler.step_update(self._progress.step)
        if self._average is not None:
            self._average.update(self._progress.step)
        self._progress.images += int(figures.images)
        self._progress.epoch_loss += sum(figures.losses.values())
        return figures, stops

    def _figures(self, stop: bool) -> tuple[Figures, bool]:
        norm = self._accelerator.clip_grad_norm_(self._student.parameters(), self._gradient_clip)
        device = self._accelerator.device
        if norm is None:
            norm = torch.zeros((), device=device)
        # Everything that the host needs to know of a step is read at once: one synchronisation.
        sums = self._sums | {"norm": norm.float(), "stop": torch.tensor(float(stop), device=device)}
        self._sums = {}
        stacked = self._accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "sum")
        values = dict(zip(sums, stacked.tolist(), strict=True))
        norm_sum, stops, forwards = values.pop("norm"), values.pop("stop"), values.pop("forwards")
        images, found = values.pop("images"), values.pop("hits")
        losses = {name: value / forwards for name, value in values.items()}
        rate = self._optimizer.param_groups[0]["lr"]
        return Figures(losses, found, images, norm_sum, rate), stops > 0

    def _fail(self, what: str, value: float, epoch: int, rate: float) -> None:
        self._optimizer.zero_grad()
        self._report.fail(what, value, epoch, rate)
