"""`evopatch finetune`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import ConfigError, TrainingError, TrainingInterruptedError
from ..progress import errors
from ..sources.preprocessing import Preprocessing
from ..training.settings import FinetuneConfig
from . import options, settings_file
from .class_numbers import number_as_model
from .finetune_report import report
from .patch_options import Asked, one_config, patch
from .preprocessing_options import with_preprocessing
from .tables import counted
from .training_options import with_training

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from ..sources.dataset import Images
    from ..sources.models import Classifier, Renormalised

_DATA = "Data and augmentation"
_INSTEAD = ", or --no-pretrained to train from scratch; `--data digits` needs no network either"


class _Splits(NamedTuple):
    train: Images
    evaluation: Images | None
    classes: int | None


@one_config
@with_preprocessing
@with_training
def finetune(
    ctx: typer.Context,
    model: options.Model,
    *,
    config: options.ConfigFile = None,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    pretrained: Annotated[bool, typer.Option(help="Begin with pretrained weights, or with random ones.")] = True,
    teacher: Annotated[
        str | None, typer.Option(help="Another classifier to learn from. Default: the model itself, unpatched.")
    ] = None,
    teacher_checkpoint: Annotated[Path | None, typer.Option(help="The teacher's weights in timm's layout.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints, log and the trained model. Default: evopatch-finetune-MODEL."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    data: Annotated[
        str,
        typer.Option(
            help="An ImageFolder directory, a folder of images without labels, a .parquet or .arrow file, the name "
            "of a data set on the Hugging Face hub, or digits (scikit-learn's, no network).",
            rich_help_panel=_DATA,
        ),
    ] = "digits",
    eval_data: Annotated[
        str | None,
        typer.Option(help="The same, to measure on. Default: the part that --data has for it.", rich_help_panel=_DATA),
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Train on these only, as in :650.", rich_help_panel=_DATA)] = None,
    eval_rows: Annotated[
        str | None, typer.Option(help="Measure on these only, as in 650:.", rich_help_panel=_DATA)
    ] = None,
    labels: Annotated[
        bool, typer.Option(help="Use the labels of the training data, or learn without.", rich_help_panel=_DATA)
    ] = True,
    preprocessing: Preprocessing,
    scale: Annotated[
        str,
        typer.Option(
            help="Smallest share of the area that a random crop covers, and the largest.", rich_help_panel=_DATA
        ),
    ] = "0.35,1",
    hflip: Annotated[float, typer.Option(help="Probability of a mirror image.", rich_help_panel=_DATA)] = 0.5,
    color_jitter: Annotated[float | None, typer.Option(help="Strength.", rich_help_panel=_DATA)] = None,
    auto_augment: Annotated[
        str | None, typer.Option(help="timm's name of a policy, such as rand-m9-mstd0.5-inc1.", rich_help_panel=_DATA)
    ] = None,
    random_erasing: Annotated[float, typer.Option(help="Probability.", rich_help_panel=_DATA)] = 0.0,
    asked: Asked,
    training: FinetuneConfig,
) -> None:
    """Patch a classifier and train it: with labels, or without any, taught by itself unpatched.

    Ctrl-C saves; the same command with --resume goes on. Several GPUs or machines: accelerate launch -m evopatch ...

        evopatch finetune --model vit_base_patch16_224 --data imagenet --epochs 10

        evopatch finetune --model deit_tiny_patch16_224 --data photos/ --eval-data val.parquet --paper

        evopatch finetune --model vit_tiny_patch16_224 --no-pretrained --image-size 32 --mixup 0.8

        evopatch finetune --config evopatch-finetune-deit_tiny_patch16_224/config.toml --resume
    """
    from ..sources.augment import Augmentation, training_transform
    from ..sources.heads import count_classes, reset_head
    from ..sources.models import open_classifier
    from ..sources.saving import save_pretrained
    from ..training import processes
    from ..training.finetuning import finetune as run
    from ..training.randomness import seed_everything

    seed_everything(training.seed)  # random weights and heads
    own_name = re.sub(r"[^A-Za-z0-9_.-]+", "-", model).strip("-")
    folder = settings_file.folder_of(ctx, Path(f"evopatch-finetune-{own_name}"))
    settings_file.check(folder, ctx)
    classifier = open_classifier(model, checkpoint, num_classes, preprocessing, pretrained, instead=_INSTEAD)
    classifier.model.float()  # most updates would be less than a rounding error of half precision
    splits = _open(data, eval_data)
    taught_by = _teacher(teacher, teacher_checkpoint, classifier)
    old_classes = count_classes(classifier.model)
    new_head = labels and splits.classes not in (None, old_classes)
    if new_head:
        assert splits.classes is not None
        found = counted(splits.classes, "class", "classes")
        _say(f"{data} has {found}: {model} gets a new head in place of the one for {old_classes}")
        reset_head(classifier.model, splits.classes)
    from_random = new_head or (not pretrained and checkpoint is None)
    labelled = labels and splits.train.labels is not None
    if taught_by is None and from_random and (not labelled or training.objective == "distillation"):
        why = f", and {data} has no labels" if labels and not labelled else ""
        raise ConfigError(f"a model with random weights can't teach itself{why}: give --teacher, or train with labels")
    if training.trainable != "all" and from_random:
        raise ConfigError(f"--trainable {training.trainable} would leave random weights as they are: use all")
    augmentation = Augmentation(_pair(scale), hflip, color_jitter, auto_augment, random_erasing)
    splits.train.transform = training_transform(classifier, augmentation)
    if not labels:
        splits.train.labels = None
    taught = training.is_taught(taught_by is not None)
    teacher_model = None if taught_by is None else taught_by.model
    if labelled and (not taught or training.label_weight > 0):
        _name_classes(splits, classifier.model, teacher_model, data, eval_data or data)
    else:
        if teacher_model is not None:
            _name_as_teacher(classifier.model, teacher_model, splits.train)
        _number_evaluation(splits, classifier.model, data, eval_data or data, model)
    patch(classifier.model, model, asked)
    trained_on = _subset(splits.train, rows, "--rows")
    evaluation = None if splits.evaluation is None else _evaluated(splits.evaluation, classifier, eval_rows)
    try:
        with settings_file.saved(folder, ctx):
            result = run(
                classifier.model, trained_on, evaluation, training, teacher=taught_by, output=folder, resume=resume,
                progress=True,
            )  # fmt: skip
    except TrainingInterruptedError as error:
        how = f"evopatch finetune --config {folder / settings_file.NAME} --resume"
        raise TrainingError(f"{str(error).split('. Call again')[0]}. To go on: {how}") from None
    processes.end()
    if not processes.is_main():
        return
    save_pretrained(classifier.model, folder / "model", classifier.processor)
    report(model, result, from_random, folder)


def _open(data: str, eval_data: str | None) -> _Splits:
    from ..sources.images import open_evaluation, open_images, open_part

    train = open_images(data)
    evaluation = open_part(data, "eval") if eval_data is None else open_evaluation(eval_data)
    return _Splits(train, evaluation, train.classes)


def _name_classes(splits: _Splits, network: nn.Module, teacher: nn.Module | None, data: str, eval_data: str) -> None:
    """Classes of the training data, of the evaluation data, of the teacher and of the model are the same ones, and have
    their names."""
    from ..sources.heads import class_names, set_class_names

    train, evaluation = splits.train, splits.evaluation
    if train.class_names is None:
        return
    own = class_names(network if teacher is None else teacher)
    if own is not None and set(own) == set(train.class_names):
        train.number_as(own, data)
    elif own is not None and teacher is not None:
        raise ConfigError(
            f"--label-weight with a teacher of the classes {', '.join(own[:4])}, ...: {data} has "
            f"{', '.join(train.class_names[:4])}, ...; expected the same ones. Leave the labels or the teacher out"
        )
    set_class_names(network, train.class_names)
    if evaluation is not None:
        evaluation.number_as(train.class_names, eval_data)


def _name_as_teacher(network: nn.Module, teacher: nn.Module, train: Images) -> None:
    """What predicts as its teacher does has the teacher's classes, whatever the images are of; of a teacher that knows
    no names, those of the images are all that there is."""
    from ..sources.heads import class_names, count_classes, set_class_names

    names = class_names(teacher)
    if names is None and class_names(network) is None and train.class_names is not None:
        names = train.class_names if len(train.class_names) == count_classes(network) else None
    if names is not None:
        set_class_names(network, names)


def _number_evaluation(splits: _Splits, network: nn.Module, data: str, eval_data: str, model: str) -> None:
    train, evaluation = splits.train, splits.evaluation
    if evaluation is None:
        return
    # A part for evaluation may lack classes that the other has.
    if train.class_names is not None and set(evaluation.class_names or ()) <= set(train.class_names):
        evaluation.number_as(train.class_names, eval_data)
    if said := number_as_model(evaluation, network, eval_data, model):
        _say(said)


def _subset(images: Images, rows: str | None, option: str) -> Dataset[Any]:
    from torch.utils.data import Subset

    return images if rows is None else Subset(images, options.parse_rows(rows, len(images), option))


def _evaluated(images: Images, classifier: Classifier, rows: str | None) -> Dataset[Any]:
    images.transform = classifier.transform
    return _subset(images, rows, "--eval-rows")


def _pair(text: str) -> tuple[float, float]:
    value = options.parse_ratios(text)
    if not isinstance(value, tuple) or len(value) != 2 or not 0 < value[0] <= value[1] <= 1:
        raise typer.BadParameter(f"--scale {text}: expected two shares in (0, 1], as in 0.35,1")
    return value


def _teacher(name: str | None, checkpoint: Path | None, student: Classifier) -> Renormalised | None:
    from ..sources.models import Renormalised, open_classifier

    if name is None:
        if checkpoint is not None:
            raise ConfigError("--teacher-checkpoint without --teacher: give the name of the model that it is of")
        return None
    teacher = open_classifier(name, checkpoint)
    if teacher.input_size != student.input_size:
        raise ConfigError(
            f"the teacher {name} takes images of {teacher.input_size} and the model of {student.input_size}: expected "
            "the same size"
        )
    return Renormalised(teacher, student.mean, student.std)


def _say(text: str) -> None:
    from ..training import processes

    if processes.is_main():
        errors.print(text, highlight=False, soft_wrap=True)
