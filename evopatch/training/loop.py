"""The training loop on accelerate: epochs, steps, what is logged, when it is saved."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import ConfigError, DataError, TrainingError, TrainingInterruptedError
from ..measure.accuracy import logits_of
from ..patching.handle import Patched
from . import checkpoints, log, processes
from .interrupt import Request, deferred
from .items import Batch, Items, collate, refuse_unreadable
from .meter import Meter
from .objective import Objective, hits
from .randomness import seed_everything
from .settings import MAY_DIFFER, FinetuneConfig
from .student import Student

SKIPPED_LIMIT = 20
"""Optimizer steps in a row without a finite gradient, in fp16; each halves the scale of the loss."""


@dataclass
class Progress:
    """How far a run is; part of its checkpoints."""

    step: int = 0
    """Optimizer steps done."""
    images: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Mean loss of every finished epoch."""
    epoch_loss: float = 0.0
    """Sum over the steps of the current epoch."""
    unreadable: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """For accelerate."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For accelerate."""
        self.__dict__.update(state)


class Run:
    """One run over the training data.

    Args:
        model: Patched; trained in place.
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
        items: Items,
        config: FinetuneConfig,
        objective: Objective,
        teacher: nn.Module | None,
        output: Path | None,
        taught_by: str | None = None,
    ) -> None:
        self.model, self.items, self.config, self.objective, self.output = model, items, config, objective, output
        self._log = None if output is None else log.JsonLines(output / log.FILE)
        self.accelerator = self._make_accelerator()
        self.device = self.accelerator.device
        self._patch_config, self._taught_by = Patched(model).config, taught_by
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        model.to(self.device)
        self.teacher = None if teacher is None else teacher.to(self.device)
        seed_everything(config.seed)  # the second head's weights
        image = items[0].image
        assert image is not None
        student = Student(model, image, config.assisted_weight > 0, objective.distils and config.label_weight > 0)
        self._check_teacher(student.classes, image)
        items.classes = student.classes if objective.uses_labels else None
        self._mixup = self._make_mixup(student.classes)
        _freeze(model, config)
        try:
            self._prepare(student)
        except BaseException:
            self.close()
            raise
        self.progress = Progress()
        self._skipped = 0
        self._ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
        for stateful in filter(None, (self.progress, self._ema)):
            self.accelerator.register_for_checkpointing(stateful)

    def _make_accelerator(self) -> Accelerator:
        config = self.config
        precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        try:
            accelerator = Accelerator(
                cpu=processes.on_cpu(),
                mixed_precision=precision,
                gradient_accumulation_steps=config.accumulation_steps,
                dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
                # Some models have parameters that a classification doesn't use, such as mask tokens.
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
                log_with=None if self._log is None else [self._log, *log.tensorboard()],
                project_dir=self.output,
            )
        except ValueError as error:  # accelerate keeps its state for the life of a process
            raise ConfigError(f"mixed precision '{precision}': {error}") from error
        if precision == "fp16" and accelerator.device.type == "cpu":
            raise ConfigError("mixed precision 'fp16' on the CPU: accelerate has none there, use 'bf16' or 'no'")
        return accelerator

    def _prepare(self, student: Student) -> None:
        config = self.config
        if sum(p.requires_grad for p in student.parameters()) == 0:
            raise ConfigError(f"trainable='{config.trainable}': no parameter of the model is left to train")
        try:
            optimizer = create_optimizer_v2(
                student, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay
            )
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"optimizer='{config.optimizer}': {error}") from error
        loader = DataLoader(
            self.items,
            min(config.batch_size, len(self.items)),
            shuffle=True,
            drop_last=True,
            collate_fn=collate,
            num_workers=config.workers,
        )
        prepared: Any = self.accelerator.prepare(student, optimizer, loader)
        self.student, self.optimizer, self.loader = prepared
        self.steps_per_epoch = math.ceil(len(self.loader) / config.accumulation_steps)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{len(self.items)} training images are fewer than one batch of {config.batch_size} for each of "
                f"{self.accelerator.num_processes} processes: give a smaller batch_size"
            )
        self.steps = config.epochs * self.steps_per_epoch
        self._scheduler = self._make_scheduler(optimizer)

    def _make_scheduler(self, optimizer: Any) -> Any:
        config = self.config
        try:
            # By steps, not epochs: a short run warms up within its first epoch.
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=config.scheduler,
                num_epochs=config.epochs,
                warmup_epochs=config.warmup_epochs,
                warmup_lr=config.learning_rate / 10,
                step_on_epochs=False,
                updates_per_epoch=self.steps_per_epoch,
                **self._decay(),
            )
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"scheduler='{config.scheduler}': {error}") from error
        if scheduler is None:
            raise ConfigError(f"scheduler='{config.scheduler}': expected one of timm's, such as 'cosine' or 'constant'")
        return scheduler

    def _decay(self) -> dict[str, Any]:
        # timm's defaults are for runs of hundreds of epochs: a short one would never come to its first decay.
        epochs = self.config.epochs
        lengths: dict[str, dict[str, Any]] = {
            "step": {"decay_epochs": epochs / 3},
            "multistep": {"decay_milestones": [epochs / 3, 2 * epochs / 3]},
            "poly": {"decay_rate": 1.0},
        }
        return lengths.get(self.config.scheduler, {})

    def _check_teacher(self, classes: int, image: Tensor) -> None:
        if self.teacher is None:
            return
        parameter = next(self.teacher.parameters())
        with torch.no_grad():
            found = logits_of(self.teacher(image.unsqueeze(0).to(self.device, parameter.dtype))).shape[1]
        if found != classes:
            raise ConfigError(f"the teacher has {found} classes and the model {classes}: expected the same ones")

    def _make_mixup(self, classes: int) -> Mixup | None:
        config = self.config
        if not config.mixup and not config.cutmix:
            return None
        if min(config.batch_size, len(self.items)) % 2:
            raise ConfigError(f"{len(self.items)} training images: Mixup and CutMix need an even batch")
        smoothing = config.label_smoothing
        return Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes)

    def _settings(self) -> dict[str, Any]:
        settings = {key: value for key, value in self.config.to_dict().items() if key not in MAY_DIFFER}
        settings |= {
            "patch": self._patch_config.to_dict(),
            "images": len(self.items),
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "objective": "distillation" if self.objective.distils else "labels",
            "teacher": self._taught_by,
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))  # as they come back from a checkpoint
        return plain

    def resumable(self) -> Path | None:
        """The newest whole checkpoint of the output folder; None where there is none.

        Raises:
            CheckpointError: If all are damaged.
            ConfigError: If they are of a run with other settings.
        """
        path = None if self.output is None else checkpoints.latest(self.output)
        if path is None:
            return None
        expected, found = self._settings(), checkpoints.settings_of(path)
        different = sorted(key for key in expected | found if expected.get(key) != found.get(key))
        if different:
            raise ConfigError(
                f"{path} is of a run with other settings: "
                + ", ".join(f"{key} was {found.get(key)!r} and is {expected.get(key)!r} now" for key in different)
                + ". Resume with the same ones, or start anew in another output folder"
            )
        return path

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint that `resumable` found."""
        checkpoints.restore(path, self.accelerator)
        self._scheduler.step_update(self.progress.step)

    def train(self, show: Callable[[int, str], None]) -> None:
        """All epochs that are left; `show` gets the number of steps done since its last call, and a live line.

        Raises:
            TrainingError: If loss or gradient are no finite numbers; the model has the weights from before that step.
            TrainingInterruptedError: After Ctrl-C or SIGTERM, where there is an output folder to save to.
            DataError: If too many images can't be read.
        """
        show(self.progress.step, "")
        self._begin = time.perf_counter()
        self._meter = Meter("accuracy" if self.objective.uses_labels else "agreement")
        with deferred(self.output is not None) as request, self._trackers():
            first, done = divmod(self.progress.step, self.steps_per_epoch)
            for epoch in range(first, self.config.epochs):
                self._epoch(epoch, done if epoch == first else 0, request, show)
        if self._ema is not None:
            self.model.load_state_dict(self._ema.module.state_dict())
        self.progress.seconds += time.perf_counter() - self._begin

    def close(self) -> None:
        """Leave the model with the settings, mode and gradient flags that it came with, but in eval mode."""
        Patched(self.model).set_config(self._patch_config)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        self.model.zero_grad()
        self.model.eval()

    @contextmanager
    def _trackers(self) -> Iterator[None]:
        if self.output is not None:
            self.accelerator.init_trackers("tensorboard")
        self._event("begin" if self.progress.step == 0 else "resumed", settings=self._settings(), **log.versions())
        try:
            yield
            self._event("end", losses=self.progress.losses)
        finally:
            # `end_training` would also destroy the process group, which is the caller's.
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _epoch(self, epoch: int, done: int, request: Request, show: Callable[[int, str], None]) -> None:
        Patched(self.model).set_config(self.config.of_epoch(self._patch_config, epoch))
        self.student.train()
        if self.config.freeze_batch_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        self.items.set_epoch(epoch)
        loader = self.loader
        if done:
            loader = self.accelerator.skip_first_batches(loader, done * self.config.accumulation_steps)
        loader.set_epoch(epoch)
        sums: dict[str, Tensor] = {}
        accumulated = self.config.accumulation_steps
        for number, batch in enumerate(loader, done * accumulated):
            self._note_unreadable(batch.unreadable)
            first, forward = number - number % accumulated, number % accumulated
            # accelerate divides by the configured number, but the last step of an epoch may have fewer forwards.
            scale = accumulated / min(accumulated, len(self.loader) - first)
            with self.accelerator.accumulate(self.student):
                self._forward_backward(batch, sums, forward, scale)
                if not self.accelerator.sync_gradients:
                    continue
                stop = self._optimizer_step(sums, epoch, request.made)
            sums = {}
            show(1, f"epoch {epoch + 1}/{self.config.epochs}, {self._meter.live()}")
            ends = self.progress.step % self.steps_per_epoch == 0
            if ends:
                self.progress.losses.append(self.progress.epoch_loss / self.steps_per_epoch)
                self.progress.epoch_loss = 0.0
                self._check_unreadable()
            every = self.config.checkpoint_every
            if stop or (ends if every is None else self.progress.step % every == 0 or self.progress.step == self.steps):
                self._save()
            if stop and self.progress.step < self.steps:
                raise TrainingInterruptedError(
                    f"stopped after step {self.progress.step} of {self.steps}; everything up to there is saved in "
                    f"{self.output}. Call again with the same settings and resume=True to go on"
                )

    def _forward_backward(self, batch: Batch, sums: dict[str, Tensor], forward: int, scale: float) -> None:
        images, labels, _ = batch
        # Dropout of this forward: a function of the seed and the place, so that a resumed run repeats it.
        seed_everything(self.config.seed, self.progress.step, forward, self.accelerator.process_index)
        targets = labels if self.objective.uses_labels else None
        if self._mixup is not None:
            any_label = torch.zeros(len(images), dtype=torch.long, device=images.device)
            images, mixed = self._mixup(images, any_label if targets is None else targets)
            targets = None if targets is None else mixed
        teacher = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher = logits_of(self.teacher(images.to(next(self.teacher.parameters()).dtype)))
        outputs = self.student(images)
        terms = self.objective.terms(outputs, targets, teacher)
        self.accelerator.backward(torch.stack(list(terms.values())).sum() * scale)
        found = {name: term.detach() for name, term in terms.items()}
        found |= {
            "hits": hits(outputs, targets, teacher),
            "forwards": images.new_ones(()),
            "images": images.new_tensor(len(images)),
        }
        for name, value in found.items():
            sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value

    def _optimizer_step(self, sums: dict[str, Tensor], epoch: int, stop: bool) -> bool:
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.gradient_clip)
        if norm is None:
            norm = torch.zeros((), device=self.device)
        # Everything that the host needs to know of a step is read at once: one synchronisation.
        sums = sums | {"norm": norm.float(), "stop": torch.tensor(float(stop), device=self.device)}
        stacked = self.accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "sum")
        values = dict(zip(sums, stacked.tolist(), strict=True))
        norm_sum, stops, forwards = values.pop("norm"), values.pop("stop"), values.pop("forwards")
        images, found = values.pop("images"), values.pop("hits")
        losses = {name: value / forwards for name, value in values.items()}
        rate = self.optimizer.param_groups[0]["lr"]
        gradient = f"norm of the gradient of the {' + '.join(losses)}"
        # A scaler leaves out steps whose gradient overflows, and scales less after each of them.
        checked = losses if self.accelerator.scaler is not None else {**losses, gradient: norm_sum}
        for name, value in checked.items():
            if not math.isfinite(value):
                self._fail(name, value, epoch, rate)
        self.optimizer.step()
        self._skipped = self._skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
        if self._skipped == SKIPPED_LIMIT:
            self._fail(gradient, norm_sum, epoch, rate)
        self.optimizer.zero_grad()
        self.progress.step += 1
        self._scheduler.step_update(self.progress.step)
        if self._ema is not None:
            if (generator := getattr(self._ema, "_sr_generator", None)) is not None:
                generator.manual_seed(self.progress.step)  # of its rounding; isn't part of its state
            self._ema.update(self.model, self.progress.step)
        self.progress.images += int(images)
        self.progress.epoch_loss += sum(losses.values())
        self._meter.add(losses, found, images)
        if self.progress.step % self.config.log_every == 0 or self.progress.step == self.steps:
            norm_mean = norm_sum / self.accelerator.num_processes if math.isfinite(norm_sum) else None
            line = {"epoch": epoch, "learning_rate": rate, "gradient_norm": norm_mean}
            self.accelerator.log(self._meter.line() | line, step=self.progress.step)
        return bool(stops > 0)

    def _event(self, name: str, **values: Any) -> None:
        if self._log is not None:
            self._log.event(name, self.progress.step, **values)

    def _fail(self, what: str, value: float, epoch: int, rate: float) -> None:
        self.optimizer.zero_grad()
        self._event("failed", what=what, value=str(value), learning_rate=rate)
        kept = ""
        if self.output is not None and (saved := checkpoints.steps(self.output)):
            kept = f" The last checkpoint, of step {saved[-1]}, is in {self.output}."
        raise TrainingError(
            f"the {what} is {value} at step {self.progress.step} (epoch {epoch}, learning rate {rate:.3g}): use a "
            f"smaller learning rate, or float32. The model has the weights from before this step.{kept}"
        )

    def _save(self) -> None:
        if self.output is None:
            return
        now = time.perf_counter()
        self.progress.seconds += now - self._begin
        checkpoints.write(
            self.output, self.progress.step, self.accelerator, self._settings(), self.config.checkpoints_kept
        )
        self._event("checkpoint")
        self._begin = time.perf_counter()

    def _note_unreadable(self, names: tuple[str, ...]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self.progress.unreadable]
        if new:
            self.progress.unreadable.extend(new)
            self._event("unreadable", images=new)
            refuse_unreadable(self.progress.unreadable, len(self.items), "training")

    def _check_unreadable(self) -> None:
        # Each process met its own.
        from accelerate.utils import gather_object

        gathered = gather_object(self.progress.unreadable)
        self.progress.unreadable = sorted(set(gathered))
        refuse_unreadable(self.progress.unreadable, len(self.items), "training")


def _freeze(model: nn.Module, config: FinetuneConfig) -> None:
    if config.trainable == "all":
        return
    blocks = {
        id(parameter)
        for host in Patched(model).hosts.values()
        for block in host.blocks()
        for path in block
        for parameter in model.get_submodule(path).parameters()
    }
    for parameter in model.parameters():
        trained = id(parameter) in blocks if config.trainable == "blocks" else parameter.ndim <= 1
        parameter.requires_grad_(parameter.requires_grad and trained)
