"""Fine-tune a patched model: with labels, or without any by the unpatched model's own predictions."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ..errors import CheckpointError, ConfigError, DataError
from ..measure.accuracy import Evaluation
from ..measure.timing import compare_speed, compare_training_speed
from ..patching.handle import Patched, unpatch
from . import checkpoints, teachers
from .evaluation import EvaluationData
from .items import Items, other_numbers
from .randomness import preserved
from .result import TIMED_BATCH, FinetuneResult
from .settings import FinetuneConfig

if TYPE_CHECKING:
    from .loop import Run

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune"]


def finetune(
    model: nn.Module,
    train_data: Dataset[Any],
    eval_data: Dataset[Any] | None = None,
    config: FinetuneConfig = FinetuneConfig(),
    *,
    teacher: nn.Module | str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Train a patched classifier in place, on the devices that accelerate is configured for.

    The objective and its equations are in `evopatch.training.objective.Objective`. A model with other outputs than
    classes, such as a regression, is trained without labels only: by a teacher.

    Args:
        model: A patched classifier of timm or transformers.
        train_data: Items are `(image, label)`, mappings with `pixel_values` and maybe `labels` (as for
            transformers' Trainer), or images alone: `(3, height, width)`, normalised as the model expects.
        eval_data: The same: evaluated before and after.
        config: How.
        teacher: Whose predictions are learned: another classifier of the same classes and input, or its name (as for
            `evopatch evaluate --model`). It may share values with the model, but none that are trained. None: for
            distillation, the model as it is given, unpatched.
        output: A folder for checkpoints and the log. A damaged or interrupted run can be resumed from it.
        resume: Go on from the newest checkpoint in `output`, or begin where there is none yet; call with the same
            model, data and settings as before.
            The weights end up the same as without the interruption (CPU, same number of processes).
        progress: Show a progress bar.

    Returns:
        Losses, speed, and evaluations if there are evaluation data. The model is in eval mode.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        ConfigError: If parts of the model are patched with different settings, or a setting doesn't fit the model,
            the teacher, or the run that is resumed.
        CheckpointError: If the output folder holds a run and `resume` isn't set, or no checkpoint in it is whole.
        DataError: If the training data are empty, of another kind, not as the model takes them or not finite, the
            objective needs labels and they have none, or none under a known name, a label is outside the model's
            classes, or more than 1 % of the images can't be read.
        UnsupportedModelError: If the model gives no logits.
        TrainingError: If loss or gradient are no longer finite; the model keeps the weights before that step. Or if
            the run came to fewer or more steps than planned.
        TrainingInterruptedError: After Ctrl-C or SIGTERM where there is an output folder; a KeyboardInterrupt.
    """
    if not isinstance(config, FinetuneConfig):
        raise ConfigError(f"config is a {type(config).__name__}: expected an evopatch.FinetuneConfig")
    patched = Patched(model)
    if len(set(patched.configs.values())) > 1:
        raise ConfigError("parts of the model are patched with different settings: expected one for all")
    folder = None if output is None else Path(output)
    _check_output(folder, resume)
    with preserved():
        return _finetune(model, patched, train_data, eval_data, config, teacher, folder, resume, progress)


def _finetune(
    model: nn.Module,
    patched: Patched[nn.Module],
    train_data: Dataset[Any],
    eval_data: Dataset[Any] | None,
    config: FinetuneConfig,
    teacher: nn.Module | str | None,
    folder: Path | None,
    resume: bool,
    progress: bool,
) -> FinetuneResult:
    from ..progress import progress_bar
    from . import preparation, processes
    from .loop import Run
    from .objective import Objective

    taught = config.is_taught(teacher is not None)
    items = Items(train_data, config.seed, labelled=not taught or config.label_weight > 0)
    if len(items) == 0:
        raise DataError("no images to train on")
    objective = Objective(config, _distils(items, train_data, config, teacher is not None))
    patched.forget_caches()  # may hold tensors of a graph, which can't be copied
    original = unpatch(copy.deepcopy(model)).eval().requires_grad_(False)
    begun = folder is not None and resume and bool(checkpoints.steps(folder))
    if folder is not None and begun:
        checkpoints.load_initial(folder, original)
    taught_by = teachers.find(teacher, original) if objective.distils else None
    trained = preparation.trained(patched, config)
    if taught_by is not None:
        teachers.check_apart(taught_by, model, trained)
    _warn_of_half_precision(trained)
    identity = None if taught_by is None else "itself" if teacher is None else teachers.identity(taught_by)
    patch_config = patched.config
    evaluation = None if eval_data is None else EvaluationData(eval_data, config.batch_size)
    unpatched = before = after = None
    mode = None
    if taught_by is not None:
        mode = taught_by.training
        taught_by.eval()
    try:
        run = Run(model, patched, items, config, objective, taught_by, folder, identity)
        try:
            # After what could be wrong was looked at: a run that can't begin leaves no folder.
            if folder is not None and not begun and processes.is_main():
                checkpoints.write_initial(folder, original)
            reached = run.resumable() if resume else None
            if begun:  # a model that was trained before it was interrupted begins anew
                model.load_state_dict(original.state_dict())
            if evaluation is not None:
                evaluation.set_classes(run.classes)
                unpatched, before = evaluation.run(patched)
            if reached is not None:
                run.resume(reached)
            hidden = not progress or not run.accelerator.is_main_process
            description = "fine-tuning" + (", resumed" if reached else "")
            with progress_bar(description, run.steps, disable=hidden) as advance:
                run.train(advance)
        finally:
            run.close()
    finally:
        if taught_by is not None and mode is not None:
            taught_by.train(mode)
    assert patched.config == patch_config
    if evaluation is not None:
        _, after = evaluation.run(patched, original)
    result = _result(run, items, evaluation, unpatched, before, after)
    if folder is not None and run.accelerator.is_main_process:
        (folder / "result.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _warn_of_half_precision(trained: Iterable[nn.Parameter]) -> None:
    if half := next((p.dtype for p in trained if p.dtype in (torch.bfloat16, torch.float16)), None):
        name = str(half).removeprefix("torch.")
        warnings.warn(
            f"weights that are trained are {name}, where most updates are less than a rounding error and lost: give "
            "model.float(), and mixed_precision='bf16' to compute as fast",
            stacklevel=4,
        )


def _check_output(folder: Path | None, resume: bool) -> None:
    if folder is None:
        if resume:
            raise ConfigError("resume=True without an output folder: give the one of the run to go on with")
        return
    if checkpoints.steps(folder) and not resume:
        raise CheckpointError(
            f"{folder} holds the checkpoints of a run: give resume=True to go on with it, or another output folder"
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: expected a folder for the run")


def _distils(items: Items, data: Any, config: FinetuneConfig, has_teacher: bool) -> bool:
    first = items[0]
    labelled = first.label is not None
    unclear = not labelled and not first.unreadable and config.objective == "auto" and not has_teacher
    if unclear and (found := other_numbers(data[0])):
        raise DataError(
            f"an item of the training data has no 'labels' and no 'label', and whole numbers named {found}: expected "
            "one of these names for the label. Name it so, or give objective='distillation', which needs no labels"
        )
    if not labelled and config.objective == "labels":
        raise DataError("objective='labels', but the training data have none: use objective='distillation'")
    if not labelled and config.label_weight > 0:
        raise DataError(f"label_weight={config.label_weight}, but the training data have no labels")
    if has_teacher and config.objective == "labels":
        raise ConfigError("objective='labels' with a teacher: expected objective='distillation', or no teacher")
    return config.is_taught(has_teacher or not labelled)


def _result(
    run: Run,
    items: Items,
    evaluation: EvaluationData | None,
    unpatched: Evaluation | None,
    before: Evaluation | None,
    after: Evaluation | None,
) -> FinetuneResult:
    image = items[0].image
    assert image is not None
    parameter = next(run.model.parameters())
    # The same image over and over: the time of a dense forward doesn't depend on what it shows.
    shape = (min(run.config.batch_size, TIMED_BATCH), *image.shape)
    batch = image.to(parameter.device, parameter.dtype).expand(shape).contiguous()
    done = run.progress
    return FinetuneResult(
        losses=tuple(done.losses),
        steps=done.step,
        seconds=done.seconds,
        images_per_second=done.images / done.seconds if done.seconds else float("nan"),
        unreadable=tuple(done.unreadable),
        unreadable_evaluation=() if evaluation is None else tuple(evaluation.unreadable),
        unpatched=unpatched,
        before=before,
        after=after,
        speed=compare_speed(run.model, batch, rounds=3),
        training_speed=compare_training_speed(run.model, batch, rounds=3),
    )
