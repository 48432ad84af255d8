"""The settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..config import EvoConfig
from ..errors import ConfigError

Objective = Literal["auto", "labels", "distillation"]
Targets = Literal["soft", "hard"]
Trainable = Literal["all", "blocks", "norms"]
MixedPrecision = Literal["no", "bf16", "fp16"]

_ABOVE_ZERO = ("learning_rate", "temperature", "gradient_clip")
_AT_LEAST_ZERO = ("weight_decay", "warmup_epochs", "keep_ratio_warmup_epochs", "mixup", "cutmix")
_SHARES = ("label_smoothing", "label_weight", "assisted_weight")
_COUNTS = (
    ("epochs", 1), ("batch_size", 1), ("accumulation_steps", 1), ("checkpoint_every", 1), ("checkpoints_kept", 2),
    ("log_every", 1),
    ("workers", 0), ("seed", 0),
)  # fmt: skip

MAY_DIFFER = {"checkpoint_every", "checkpoints_kept", "log_every", "workers"}
"""Settings that a resumed run may change, since its weights don't depend on them."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune. The defaults are for a pretrained model and a short run.

    Args:
        epochs: Passes over the training data.
        batch_size: Images per process and forward. The last, smaller batch of an epoch is left out, unless it is the
            only one.
        accumulation_steps: Forwards per optimizer step.
        optimizer: A name of timm's, such as `"adamw"`, `"sgd"`, `"lamb"`.
        learning_rate: Peak of the schedule.
        weight_decay: Not applied to biases and norms, nor to what timm's models say, such as position embeddings and
            class tokens. Those of transformers' models decay, as by its Trainer.
        scheduler: A name of timm's, such as `"cosine"`, `"step"`, `"poly"`; by optimizer steps.
        warmup_epochs: Length of the linear warm-up from a tenth of the rate, may be a fraction.
        gradient_clip: Largest norm of the gradient.
        objective: `"labels"`: cross-entropy. `"distillation"`: a teacher's predictions, needs no labels. `"auto"`:
            distillation for data without labels or where a teacher is given, else labels.
        distillation: `"soft"`: `T^2 KL(teacher || student)` at temperature `T` (Hinton et al., arXiv 1503.02531); of
            a regression the mean squared difference.
            `"hard"`: cross-entropy with the teacher's decision (DeiT, arXiv 2012.12877, equation 3).
        temperature: `T` of the soft distillation.
        label_weight: `w` in `w * label loss + (1 - w) * distillation loss` (DeiT, equations 2 and 3; there 0.5 for
            hard targets). Where the model has a distillation head, its class head learns the labels then, and its
            distillation head the teacher.
        label_smoothing: Of the cross-entropy with labels.
        assisted_weight: `a` in `(1 - a) * loss + a * the same loss of a second head on the class token`, for models
            that read pooled patches beside a class token (Evo-ViT, section 3.4, there 0.5): it keeps the class
            attention meaningful. The head is dropped after training.
        mixup: Alpha of Mixup (arXiv 1710.09412), 0 for none. With distillation the teacher sees the mixed images.
        cutmix: Alpha of CutMix (arXiv 1905.04899), 0 for none. With both, each batch takes one of them.
        ema_decay: Decay of an exponential moving average of the weights, which the model ends with. None: no average.
        layer_to_stage: Select before every block for the first two thirds of the epochs, then once per run (Evo-ViT,
            section 3.4). The model's own selection holds after it.
        keep_ratio_warmup_epochs: Epochs over which the keep ratio falls from 1 to the model's own, evenly.
        trainable: `"all"`; `"blocks"`: parameters of the patched blocks only; `"norms"`: norms and biases only.
        freeze_batch_norm: Batch norms (LeViT's) normalise by their running statistics in training too, and keep them.
        mixed_precision: `"no"`, `"bf16"`, `"fp16"`. None: what accelerate is configured for.
        checkpoint_every: Optimizer steps between checkpoints, where there is an output folder. None: every epoch.
        checkpoints_kept: How many of the newest checkpoints stay, at least 2: should the last turn out to be damaged,
            the one before it is used.
        log_every: Optimizer steps between two lines of the log.
        workers: Data-loading processes. The result doesn't depend on it.
        seed: Of the order of the images, their augmentation, and dropout.

    Raises:
        ConfigError: If a value is outside its range.
    """

    epochs: int = 5
    batch_size: int = 64
    accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 5e-5
    weight_decay: float = 0.05
    scheduler: str = "cosine"
    warmup_epochs: float = 0.5
    gradient_clip: float = 1.0
    objective: Objective = "auto"
    distillation: Targets = "soft"
    temperature: float = 1.0
    label_weight: float = 0.0
    label_smoothing: float = 0.1
    assisted_weight: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    layer_to_stage: bool = False
    keep_ratio_warmup_epochs: float = 0.0
    trainable: Trainable = "all"
    freeze_batch_norm: bool = False
    mixed_precision: MixedPrecision | None = None
    checkpoint_every: int | None = None
    checkpoints_kept: int = 2
    log_every: int = 10
    workers: int = 0
    seed: int = 0

    def is_taught(self, has_teacher: bool) -> bool:
        """Whether a run learns a teacher's predictions."""
        return self.objective == "distillation" or (self.objective == "auto" and has_teacher)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for name, lowest in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least {lowest}")
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a number above 0")
        for name in _AT_LEAST_ZERO:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a number of at least 0")
        for name in _SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a number in [0, 1)")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay!r}: expected a number in (0, 1), or None")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ConfigError(f"batch_size={self.batch_size}: Mixup and CutMix mix pairs, expected an even number")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON or TOML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """The inverse of `to_dict`; what is left out has its default.

        Raises:
            ConfigError: If a name is unknown or a value is outside its range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ConfigError(f"unknown settings {unknown}: expected some of {names}")
        return cls(**values)

    def of_epoch(self, patch_config: EvoConfig, epoch: int) -> EvoConfig:
        """What the model is set to in an epoch, counted from 0: `layer_to_stage` and the keep ratio's warm-up."""
        if self.layer_to_stage and epoch < 2 * self.epochs / 3:
            patch_config = replace(patch_config, selection="layer")
        if epoch < self.keep_ratio_warmup_epochs:
            share, ratio = epoch / self.keep_ratio_warmup_epochs, patch_config.keep_ratio
            warm = [1 - (1 - r) * share for r in (ratio if isinstance(ratio, tuple) else (ratio,))]
            patch_config = replace(patch_config, keep_ratio=tuple(warm) if isinstance(ratio, tuple) else warm[0])
        return patch_config


def described(config: type) -> dict[str, str]:
    """What a dataclass's docstring says about each of its fields, by name."""
    section = (inspect.getdoc(config) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _check_type(name: str, value: Any, hint: Any) -> None:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option):
                return
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return
    raise ConfigError(f"{name}={value!r}: expected {' or '.join(map(_expectation, options))}")


def _expectation(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(map(repr, get_args(option)))
    words = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a name"}
    return words.get(option, "None")
