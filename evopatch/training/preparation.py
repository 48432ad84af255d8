"""What a run is made of before its first step: accelerator, data loader, optimizer, schedule, what is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, GradientAccumulationPlugin
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader

from ..errors import ConfigError
from ..patching.handle import Patched
from . import processes
from .interrupt import outlive_a_request
from .items import Item, Items, collate
from .settings import FinetuneConfig
from .student import Student

_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def make_accelerator(config: FinetuneConfig, trackers: list[Any] | None, output: Path | None) -> Accelerator:
    """
    Args:
        config: Of the run.
        trackers: For accelerate's `log_with`.
        output: Where they write.

    Raises:
        ConfigError: If the mixed precision isn't to be had.
    """
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    try:
        accelerator = Accelerator(
            cpu=processes.on_cpu(),
            mixed_precision=precision,
            # Not as a number: the environment variable would go before it.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation_steps),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
            # Some models have parameters that a classification doesn't use, such as mask tokens.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            log_with=trackers,
            project_dir=output,
        )
    except ValueError as error:  # accelerate keeps its state for the life of a process
        raise ConfigError(f"mixed precision '{precision}': {error}") from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed precision 'fp16' on the CPU: accelerate has none there, use 'bf16' or 'no'")
    return accelerator


def check_accumulation(accelerator: Accelerator, config: FinetuneConfig) -> None:
    """
    Args:
        accelerator: After it prepared the student: DeepSpeed's own number is read then.
        config: Of the run.

    Raises:
        ConfigError: If it accumulates another number of forwards than the configuration says.
    """
    found, expected = accelerator.gradient_accumulation_steps, config.accumulation_steps
    if found != expected:
        raise ConfigError(
            f"accumulation_steps={expected}, but accelerate takes {found} forwards a step: expected the same number in "
            f"its own configuration (DeepSpeed's gradient_accumulation_steps, or {_ACCUMULATION}="
            f"{os.environ.get(_ACCUMULATION, '')}). Give it there as {expected}"
        )


def make_loader(items: Items, config: FinetuneConfig) -> DataLoader[Item]:
    """Full batches in random order, of one process."""
    return DataLoader(
        items,
        min(config.batch_size, len(items)),
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=config.workers,
        worker_init_fn=outlive_a_request,
    )


def make_optimizer(student: Student, config: FinetuneConfig) -> torch.optim.Optimizer:
    """timm's of that name.

    Raises:
        ConfigError: If there is none, it needs second derivatives, or there is nothing to train.
    """
    if sum(p.requires_grad for p in student.parameters()) == 0:
        raise ConfigError(f"trainable='{config.trainable}': no parameter of the model is left to train")
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            student, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"optimizer='{config.optimizer}': {error}") from error
    if getattr(optimizer, "is_second_order", False):  # also of one that lookahead is around
        raise ConfigError(
            f"optimizer='{config.optimizer}' needs second derivatives, which a step here doesn't make: expected one of "
            "timm's that takes gradients only, such as 'adamw', 'sgd' or 'lamb'"
        )
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps_per_epoch: int) -> Any:
    """timm's of that name.

    Raises:
        ConfigError: If there is none.
    """
    try:
        # By steps, not epochs: a short run warms up within its first epoch.
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.scheduler,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.learning_rate / 10,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **_decay(config),
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"scheduler='{config.scheduler}': {error}") from error
    if scheduler is None:
        raise ConfigError(f"scheduler='{config.scheduler}': expected one of timm's, such as 'cosine' or 'constant'")
    return scheduler


def _decay(config: FinetuneConfig) -> dict[str, Any]:
    # timm's defaults are for runs of hundreds of epochs: a short one would never come to its first decay.
    epochs = config.epochs
    lengths: dict[str, dict[str, Any]] = {
        "step": {"decay_epochs": epochs / 3},
        "multistep": {"decay_milestones": [epochs / 3, 2 * epochs / 3]},
        "poly": {"decay_rate": 1.0},
    }
    return lengths.get(config.scheduler, {})


def make_mixup(config: FinetuneConfig, images: int, classes: int) -> Mixup | None:
    """Mixup and CutMix, if they are wanted.

    Args:
        config: Of the run.
        images: How many there are to train on.
        classes: Of the model.

    Raises:
        ConfigError: If a batch can't be mixed in pairs.
    """
    if not config.mixup and not config.cutmix:
        return None
    if min(config.batch_size, images) % 2:
        raise ConfigError(f"{images} training images: Mixup and CutMix need an even batch")
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)


def trained(patched: Patched[nn.Module], config: FinetuneConfig) -> list[nn.Parameter]:
    """Parameters that `config.trainable` takes in, of those that the model has gradients of."""
    model = patched.model
    candidates = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.trainable == "all":
        return candidates
    if config.trainable == "norms":
        return [parameter for parameter in candidates if parameter.ndim <= 1]
    blocks = {
        id(parameter)
        for host in patched.hosts.values()
        for block in host.blocks()
        for path in block
        for parameter in model.get_submodule(path).parameters()
    }
    return [parameter for parameter in candidates if id(parameter) in blocks]


def freeze(patched: Patched[nn.Module], config: FinetuneConfig) -> None:
    """Take the gradients from what `config.trainable` leaves out."""
    kept = set(map(id, trained(patched, config)))
    for parameter in patched.model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
