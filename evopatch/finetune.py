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
from .patch import config_of, patched_hosts, remove, set_config

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
        if self.objective not in get_args(Objective):
            expected = ", ".join(map(repr, get_args(Objective)))
            raise ConfigError(f"objective={self.objective!r}: expected one of {expected}")


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
    """Train a patched classifier in place, on the devices and in the precision that accelerate is configured for.

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
        ConfigError: If parts of the model are patched with different settings.
        DataError: If the training data are empty, of another kind, or the objective needs labels and they have none.
        TrainingError: If loss or gradient are no longer finite; the model keeps the weights before that step.
    """
    from accelerate import Accelerator
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    from .progress import progress_bar

    if len({host._evo_patch.config for host in patched_hosts(model).values()}) > 1:
        raise ConfigError("parts of the model are patched with different settings: expected one for all")
    patch_config = config_of(model)
    distil = _distils(train_data, config.objective)
    unpatched, before = _evaluations(model, eval_data, config.batch_size)
    accelerator = Accelerator()
    teacher = remove(copy.deepcopy(model)).eval().requires_grad_(False).to(accelerator.device) if distil else None
    generator = torch.Generator().manual_seed(config.seed)
    loader: Any = DataLoader(train_data, config.batch_size, shuffle=True, generator=generator, collate_fn=_collate)
    optimizer: Any = create_optimizer_v2(model, opt="adamw", lr=config.learning_rate, weight_decay=config.weight_decay)
    attributes = set(vars(model))
    trained, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # By steps, not epochs: a short run warms up within its first epoch.
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.learning_rate / 10,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    kind, total = "distillation" if distil else "label", config.epochs * len(loader)
    losses: list[float] = []
    seen, step, begin = 0, 0, time.perf_counter()

    def check(what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} is {value} at step {step} (epoch {step // len(loader)}, learning rate "
                f"{optimizer.param_groups[0]['lr']:.3g}): use a smaller learning rate, or float32. The model has the "
                "weights from before this step"
            )

    try:
        with progress_bar("fine-tuning", total, disable=not progress or not accelerator.is_main_process) as advance:
            for epoch in range(config.epochs):
                set_config(model, _of_epoch(patch_config, config, epoch))
                trained.train()
                summed = torch.zeros((), device=accelerator.device)
                for images, labels in loader:
                    loss = _loss(trained, teacher, images, labels, config)
                    check(f"{kind} loss", loss.item())
                    accelerator.backward(loss)
                    norm = accelerator.clip_grad_norm_(trained.parameters(), config.gradient_clip)
                    if norm is not None and accelerator.scaler is None:  # a scaler leaves such steps out by itself
                        check(f"norm of the {kind} loss's gradient", float(norm))
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
                    scheduler.step_update(step)
                    summed += loss.detach()
                    seen += len(images) * accelerator.num_processes
                    advance(1, f"epoch {epoch + 1}/{config.epochs}, loss {loss.item():.4f}")
                losses.append((accelerator.reduce(summed, "mean") / len(loader)).item())
    finally:
        for name in set(vars(model)) - attributes:  # what accelerate set, such as a forward in mixed precision
            delattr(model, name)
        set_config(model, patch_config)
        model.eval()
    seconds = time.perf_counter() - begin
    _, after = _evaluations(model, eval_data, config.batch_size)
    return FinetuneResult(tuple(losses), seen / seconds, unpatched, before, after)


def _distils(data: Any, objective: Objective) -> bool:
    if not hasattr(data, "__len__"):
        raise DataError(f"{type(data).__name__} has no length: expected a data set with one, indexed by position")
    if len(data) == 0:
        raise DataError("no images to train on")
    _, label = _parts(data[0])
    if label is None and objective == "labels":
        raise DataError("objective='labels', but the training data have none: use objective='distillation'")
    return objective == "distillation" or (objective == "auto" and label is None)


def _of_epoch(patch_config: EvoConfig, config: FinetuneConfig, epoch: int) -> EvoConfig:
    if config.layer_to_stage and epoch < 2 * config.epochs / 3:
        return replace(patch_config, selection="layer")
    return patch_config


def _loss(
    model: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor | None, config: FinetuneConfig
) -> Tensor:
    images = images.to(next(model.parameters()).dtype)
    logits = logits_of(model(images)).float()
    if teacher is None:
        assert labels is not None
        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    with torch.no_grad():
        target = logits_of(teacher(images)).float()
    t = config.temperature
    own, wanted = (logits / t).log_softmax(1), (target / t).log_softmax(1)
    return t * t * F.kl_div(own, wanted, reduction="batchmean", log_target=True)


def _parts(item: Any) -> tuple[Tensor, Any]:
    if isinstance(item, Mapping):
        image, label = item.get("pixel_values"), item.get("labels", item.get("label"))
    elif isinstance(item, (tuple, list)):
        image, label = item[0], item[1] if len(item) > 1 else None
    else:
        image, label = item, None
    if not isinstance(image, Tensor):
        found = f"a mapping with {sorted(item)}" if isinstance(item, Mapping) else type(image).__name__
        raise DataError(
            f"an item of the data is {found}: expected a tensor (3, height, width), alone, as (image, label), or as "
            "'pixel_values' of a mapping. Give the data set a transform that makes one"
        )
    return image, label


def _collate(items: list[Any]) -> tuple[Tensor, Tensor | None]:
    images, labels = zip(*(_parts(item) for item in items), strict=True)
    return torch.stack(images), None if labels[0] is None else torch.tensor([int(label) for label in labels])


def _evaluations(
    model: nn.Module, data: Dataset[Any] | None, batch_size: int
) -> tuple[Evaluation | None, Evaluation | None]:
    if data is None:
        return None, None

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in DataLoader(data, batch_size, collate_fn=_collate):
            if labels is None:
                raise DataError(
                    "the evaluation data have no labels: expected (image, label) or a mapping with 'labels'"
                )
            yield images, labels

    size = tuple(_parts(cast(Any, data)[0])[0].shape)
    unpatched, patched = evaluate(model, batches(), [config_of(model)], cast(tuple[int, int, int], size))
    return unpatched, patched
