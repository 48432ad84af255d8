"""Fine-tune a patched model: with labels, or without any by the unpatched model's own predictions."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .config import EvoConfig
from .errors import ConfigError, DataError, TrainingError
from .evaluate import Evaluation, evaluate, logits_of
from .patch import config_of, remove, set_config
from .progress import progress_bar

Objective = Literal["auto", "labels", "distillation"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune. The defaults are for a pretrained model and a short run.

    Args:
        epochs: Passes over the training data.
        batch_size: Images per step and process.
        learning_rate: Peak of a cosine schedule, AdamW.
        weight_decay: AdamW's; not on biases and norms (timm's rule).
        warmup_epochs: Length of the linear warm-up, may be a fraction.
        objective: `"labels"`: cross-entropy. `"distillation"`: `T^2 KL(teacher || student)` at temperature `T`
            (Hinton et al., arXiv 1503.02531), where the teacher is the model as it was given, unpatched; needs no
            labels. `"auto"`: distillation for data without labels, else labels.
        temperature: `T` of the distillation.
        label_smoothing: Of the cross-entropy.
        layer_to_stage: Select before every block for the first two thirds of the epochs, then once per run (the
            paper's section 3.4). The model's own selection holds after it.
        gradient_clip: Largest norm of the gradient.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`, accelerate's.
        seed: Of the order of the images.

    Raises:
        ConfigError: If a value is outside its range.
    """

    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 5e-5
    weight_decay: float = 0.05
    warmup_epochs: float = 0.5
    objective: Objective = "auto"
    temperature: float = 1.0
    label_smoothing: float = 0.1
    layer_to_stage: bool = False
    gradient_clip: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least {lowest}")
        for name in ("learning_rate", "temperature", "gradient_clip"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a number above 0")
        for name in ("weight_decay", "warmup_epochs"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a number of at least 0")
        if not _is_number(self.label_smoothing) or not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing!r}: expected a number in [0, 1)")
        for name, allowed in (("objective", get_args(Objective)), ("mixed_precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run did."""

    losses: tuple[float, ...]
    """Mean training loss of every epoch."""
    images_per_second: float
    """Training speed, all processes together."""
    unpatched: Evaluation | None
    """The unpatched model on the evaluation data, before training."""
    before: Evaluation | None
    """The patched model before training; its agreement and KL are to the unpatched model."""
    after: Evaluation | None
    """The patched model after training; its agreement and KL are to the same model unpatched, trained as well."""


def finetune(
    model: nn.Module,
    train_data: Dataset[Any],
    eval_data: Dataset[Any] | None = None,
    config: FinetuneConfig = FinetuneConfig(),
    progress: bool = True,
) -> FinetuneResult:
    """Train a patched classifier in place, on the devices that accelerate finds.

    Args:
        model: A patched classifier of timm or transformers.
        train_data: Items are `(image, label)`, mappings with `pixel_values` and maybe `labels` (as for
            transformers' Trainer), or images alone: `(3, height, width)`, normalised as the model expects.
        eval_data: The same with labels: evaluated before and after.
        config: How.
        progress: Show a progress bar.

    Returns:
        Losses, speed, and evaluations if there are evaluation data. The model is in eval mode.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        DataError: If the training data are empty, or the objective needs labels and they have none.
        TrainingError: If the loss is no longer a finite number; the model keeps the weights before that step.
    """
    from accelerate import Accelerator
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    patch_config = config_of(model)
    if len(cast(Any, train_data)) == 0:
        raise DataError("no images to train on")
    labelled = _parts(cast(Any, train_data)[0])[1] is not None
    distil = config.objective == "distillation" or (config.objective == "auto" and not labelled)
    if not distil and not labelled:
        raise DataError("objective='labels', but the training data have none: use objective='distillation'")
    unpatched, before = _evaluations(model, eval_data, config.batch_size)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    teacher = remove(copy.deepcopy(model)).eval().requires_grad_(False).to(accelerator.device) if distil else None
    generator = torch.Generator().manual_seed(config.seed)
    loader: Any = DataLoader(train_data, config.batch_size, shuffle=True, generator=generator)
    optimizer: Any = create_optimizer_v2(model, opt="adamw", lr=config.learning_rate, weight_decay=config.weight_decay)
    trained, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # Steps, not epochs: short runs warm up within the first one.
    total = config.epochs * len(loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    losses: list[float] = []
    seen, step, begin = 0, 0, time.perf_counter()
    try:
        with progress_bar("fine-tuning", total, disable=not progress or not accelerator.is_main_process) as advance:
            for epoch in range(config.epochs):
                set_config(model, _of_epoch(patch_config, config, epoch))
                trained.train()
                summed = torch.zeros((), device=accelerator.device)
                for batch in loader:
                    images, labels = _parts(batch)
                    loss = _loss(trained, teacher, images, labels, config)
                    if not math.isfinite(loss.item()):
                        raise TrainingError(
                            f"the {'distillation' if distil else 'label'} loss is {loss.item()} at step {step} (epoch "
                            f"{epoch}, learning rate {optimizer.param_groups[0]['lr']:.3g}): use a smaller learning "
                            "rate, or mixed_precision='no'. The model has the weights from before this step"
                        )
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(trained.parameters(), config.gradient_clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
                    scheduler.step_update(step)
                    summed += loss.detach()
                    seen += len(images) * accelerator.num_processes
                    advance(1, f"epoch {epoch + 1}/{config.epochs}, loss {loss.item():.4f}")
                losses.append((accelerator.reduce(summed, "mean") / len(loader)).item())
    finally:
        set_config(model, patch_config)
        model.eval()
    seconds = time.perf_counter() - begin
    _, after = _evaluations(model, eval_data, config.batch_size)
    return FinetuneResult(tuple(losses), seen / seconds, unpatched, before, after)


def _of_epoch(patch_config: EvoConfig, config: FinetuneConfig, epoch: int) -> EvoConfig:
    if config.layer_to_stage and epoch < 2 * config.epochs / 3:
        return replace(patch_config, selection="layer")
    return patch_config


def _loss(
    model: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor | None, config: FinetuneConfig
) -> Tensor:
    logits = logits_of(model(images)).float()
    if teacher is None:
        assert labels is not None
        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    with torch.no_grad():
        target = logits_of(teacher(images)).float()
    t = config.temperature
    return (
        t
        * t
        * F.kl_div((logits / t).log_softmax(1), (target / t).log_softmax(1), reduction="batchmean", log_target=True)
    )


def _parts(item: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(item, Mapping):
        return item["pixel_values"], item.get("labels", item.get("label"))
    return (item[0], item[1]) if isinstance(item, (tuple, list)) else (item, None)


def _evaluations(
    model: nn.Module, data: Dataset[Any] | None, batch_size: int
) -> tuple[Evaluation | None, Evaluation | None]:
    if data is None:
        return None, None

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in DataLoader(data, batch_size):
            images, labels = _parts(batch)
            if labels is None:
                raise DataError(
                    "the evaluation data have no labels: expected (image, label) or a mapping with 'labels'"
                )
            yield images, labels

    size = tuple(_parts(cast(Any, data)[0])[0].shape)
    unpatched, patched = evaluate(model, batches(), [config_of(model)], cast(tuple[int, int, int], size))
    return unpatched, patched
