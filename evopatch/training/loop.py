"""The training loop on accelerate: epochs, steps, when it is saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DataError, TrainingError, TrainingInterruptedError
from ..patching.handle import Patched
from . import checkpoints, log, preparation, resuming, teachers
from .averaging import Average
from .interrupt import Request, deferred, held_back
from .items import Items
from .objective import Objective
from .randomness import seed_everything
from .reporting import Report
from .settings import FinetuneConfig
from .state import Progress
from .step import Optimization
from .student import Student


class Run:
    """One run over the training data.

    Args:
        model: Trained in place.
        patched: The handle on it.
        items: The training data.
        config: How.
        objective: What for.
        teacher: Whose predictions it learns, if any.
        output: Where checkpoints and log go, if anywhere.
        taught_by: What tells the teacher from others: it has to be the same when the run is resumed.
    """

    def __init__(
        self,
        model: nn.Module,
        patched: Patched[nn.Module],
        items: Items,
        config: FinetuneConfig,
        objective: Objective,
        teacher: nn.Module | None,
        output: Path | None,
        taught_by: str | None = None,
    ) -> None:
        self.model, self._patched, self.config, self.output = model, patched, config, output
        self.items = items
        journal = None if output is None else log.JsonLines(output / log.FILE)
        trackers = None if journal is None else [journal, *log.tensorboard()]
        self.accelerator = preparation.make_accelerator(config, trackers, output)
        self._patch_config = patched.config
        self._settings = resuming.settings_of_run(config, patched, items, self.accelerator, objective, taught_by)
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        model.to(self.accelerator.device)
        teacher = None if teacher is None else teacher.to(self.accelerator.device)
        seed_everything(config.seed)  # the second head's weights
        image = items[0].image
        assert image is not None
        student = Student(model, image, config.assisted_weight > 0, objective.distils and config.label_weight > 0)
        objective.learn(student.kind, type(model).__name__)
        if teacher is not None:
            teachers.check_classes(teacher, student.classes, image, self.accelerator.device)
        self.classes = student.classes if student.kind == "classes" else None
        """Of the model, where its outputs are classes."""
        items.classes = student.classes if objective.uses_labels else None
        mixup = preparation.make_mixup(config, len(items), student.classes)
        preparation.freeze(patched, config)
        try:
            optimizer, scheduler = self._prepare(student)
        except BaseException:
            self.close()
            raise
        self.progress = Progress()
        self._average = None if config.ema_decay is None else Average(model, config.ema_decay)
        for stateful in (self.progress, *([] if self._average is None else [self._average.state])):
            self.accelerator.register_for_checkpointing(stateful)
        accuracy = "accuracy" if objective.uses_labels else "agreement" if student.kind == "classes" else None
        self._report = Report(journal, self.accelerator, self.progress, output, len(items), accuracy)
        self._scheduler = scheduler
        self._optimization = Optimization(
            self.accelerator, self._student, optimizer, scheduler, objective, teacher, mixup, self._average,
            self.progress, self._report, config.seed, config.gradient_clip,
        )  # fmt: skip

    def _prepare(self, student: Student) -> tuple[Any, Any]:
        """Optimizer and scheduler."""
        config = self.config
        own = preparation.make_optimizer(student, config)
        prepared: Any = self.accelerator.prepare(student, own, preparation.make_loader(self.items, config))
        self._student, optimizer, self._loader = prepared
        preparation.check_accumulation(self.accelerator, config)
        self.steps_per_epoch = math.ceil(len(self._loader) / config.accumulation_steps)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{len(self.items)} training images are fewer than one batch of {config.batch_size} for each of "
                f"{self.accelerator.num_processes} processes: give a smaller batch_size"
            )
        self.steps = config.epochs * self.steps_per_epoch
        return optimizer, preparation.make_scheduler(own, config, self.steps_per_epoch)

    def resumable(self) -> Path | None:
        """The newest whole checkpoint of the output folder; None where there is none. Errors: `resuming.resumable`."""
        return None if self.output is None else resuming.resumable(self.output, self._settings)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint that `resumable` found.

        Raises:
            CheckpointError: If a file in it holds more than tensors and plain values.
        """
        checkpoints.restore(path, self.accelerator)
        self._scheduler.step_update(self.progress.step)

    def train(self, show: Callable[[int, str], None]) -> None:
        """All epochs that are left; `show` gets the number of steps done since its last call, and a live line.

        Raises:
            TrainingError: If loss or gradient are no finite numbers; the model has the weights from before that step.
                Or if it came to fewer or more steps than planned.
            TrainingInterruptedError: After Ctrl-C or SIGTERM, where there is an output folder to save to.
            DataError: If too many images can't be read.
        """
        show(self.progress.step, "")
        self._begin = time.perf_counter()
        with deferred(self.output is not None) as request, self._report.opened(self._settings):
            first, done = divmod(self.progress.step, self.steps_per_epoch)
            for epoch in range(first, self.config.epochs):
                self._epoch(epoch, done if epoch == first else 0, request, show)
            self._check_done()
        if self._average is not None:
            self._average.give()
        self.progress.seconds += time.perf_counter() - self._begin

    def close(self) -> None:
        """Leave the model with the settings, mode and gradient flags that it came with, but in eval mode."""
        self._patched.set_config(self._patch_config)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        self.model.zero_grad()
        self.model.eval()

    def _epoch(self, epoch: int, done: int, request: Request, show: Callable[[int, str], None]) -> None:
        self._begin_epoch(epoch)
        loader = self._loader
        if done:
            loader = self.accelerator.skip_first_batches(loader, done * self.config.accumulation_steps)
        loader.set_epoch(epoch)
        accumulated = self.config.accumulation_steps
        batches = iter(loader)
        with held_back():
            first_batch = list(islice(batches, 1))
        for number, batch in enumerate(chain(first_batch, batches), done * accumulated):
            self._report.note_unreadable(batch.unreadable)
            first, forward = number - number % accumulated, number % accumulated
            # accelerate divides by the configured number, but the last step of an epoch may have fewer forwards.
            scale = accumulated / min(accumulated, len(self._loader) - first)
            with self.accelerator.accumulate(self._student):
                self._optimization.forward_backward(batch, forward, scale)
                if not self.accelerator.sync_gradients:
                    continue
                figures, stop = self._optimization.step(epoch, request.made)
            step = self.progress.step
            self._report.add(figures, epoch, step % self.config.log_every == 0 or step == self.steps)
            show(1, f"epoch {epoch + 1}/{self.config.epochs}, {self._report.live()}")
            self._after_step(stop)

    def _begin_epoch(self, epoch: int) -> None:
        self._patched.set_config(self.config.of_epoch(self._patch_config, epoch))
        self._student.train()
        if self.config.freeze_batch_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        self.items.set_epoch(epoch)

    def _after_step(self, stop: bool) -> None:
        step = self.progress.step
        ends = step % self.steps_per_epoch == 0
        if ends:
            self.progress.losses.append(self.progress.epoch_loss / self.steps_per_epoch)
            self.progress.epoch_loss = 0.0
            self._report.gather_unreadable()
        every = self.config.checkpoint_every
        if stop or (ends if every is None else step % every == 0 or step == self.steps):
            self._save()
        if stop and step < self.steps:
            raise TrainingInterruptedError(
                f"stopped after step {step} of {self.steps}; everything up to there is saved in "
                f"{self.output}. Call again with the same settings and resume=True to go on"
            )

    def _check_done(self) -> None:
        # accelerate keeps what it accumulates once per process: whoever makes another Accelerator meanwhile changes it.
        step, epochs = self.progress.step, len(self.progress.losses)
        if (step, epochs) != (self.steps, self.config.epochs):
            raise TrainingError(
                f"the run ended after {step} optimizer steps and {epochs} whole epochs: expected {self.steps} and "
                f"{self.config.epochs}, of {self.config.accumulation_steps} forwards a step; accelerate took "
                f"{self.accelerator.gradient_accumulation_steps} at the end. Make no other Accelerator while it runs, "
                "and give all processes the same data"
            )

    def _save(self) -> None:
        if self.output is None:
            return
        now = time.perf_counter()
        self.progress.seconds += now - self._begin
        kept = self.config.checkpoints_kept
        checkpoints.write(self.output, self.progress.step, self.accelerator, self._settings, kept)
        self._report.event("checkpoint")
        self._begin = time.perf_counter()
