"""`evopatch finetune`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer
from rich.markup import escape

from ..errors import ConfigError, TrainingError, TrainingInterruptedError
from ..progress import errors
from ..training import checkpoints
from ..training.finetuning import TIMED_BATCH, FinetuneConfig, FinetuneResult
from ..training.settings import MAY_DIFFER, described
from . import options
from .options import RepresentativeName
from .tables import console, percent, table_of

_TRAINING = "How to train"
_DATA = "Data and augmentation"
_PATCH = "Slow-fast tokens"
SETTINGS = "config.toml"
"""The effective configuration, in the output folder."""


def _with_training_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of `FinetuneConfig`, with its default and what its docstring says."""
    hints = get_type_hints(FinetuneConfig)
    texts = described(FinetuneConfig)
    signature = inspect.signature(function)
    own = get_type_hints(function, include_extras=True)
    parameters = [
        p.replace(annotation=own[p.name]) for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD
    ]
    annotations = {p.name: p.annotation for p in parameters}
    for field in dataclasses.fields(FinetuneConfig):
        kind: Any = hints[field.name]
        if "Literal" in str(kind):  # checked by FinetuneConfig, whose message names the choices
            kind = str | None if field.default is None else str
        text = escape(texts[field.name].replace("`", ""))
        option: Any = Annotated[kind, typer.Option(help=text, rich_help_panel=_TRAINING)]
        annotations[field.name] = option
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=option)
        )
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__annotations__ = annotations
    return function


class _Splits(NamedTuple):
    train: Any
    evaluation: Any
    classes: int | None


@_with_training_options
def finetune(
    ctx: typer.Context,
    model: options.Model,
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
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    image_size: options.ImageSize = None,
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
    keep_ratio: Annotated[
        str, typer.Option(help="Mean share of slow tokens, or one per run (0.6,0.35).", rich_help_panel=_PATCH)
    ] = "0.5",
    representative: Annotated[
        RepresentativeName | None, typer.Option(help="Default matched.", rich_help_panel=_PATCH)
    ] = None,
    paper: options.Paper = False,
    selection: options.Selection = "stage",
    schedule: options.Schedule = None,
    start: options.Start = None,
    stages: options.Stages = None,
    **training: Any,
) -> None:
    """Patch a classifier and train it: with labels, or without any, taught by itself unpatched.

    Ctrl-C saves; the same command with --resume goes on. Several GPUs or machines: accelerate launch -m evopatch ...

        evopatch finetune --model vit_base_patch16_224 --data imagenet --epochs 10

        evopatch finetune --model deit_tiny_patch16_224 --data photos/ --eval-data val.parquet --paper

        evopatch finetune --model vit_tiny_patch16_224 --no-pretrained --image-size 32 --mixup 0.8

        evopatch finetune --config evopatch-finetune-deit_tiny_patch16_224/config.toml --resume
    """
    from ..patching.apply import apply
    from ..sources.augment import Augmentation, training_transform
    from ..sources.models import Preprocessing, count_classes, open_classifier, reset_head
    from ..sources.saving import save_pretrained
    from ..training import processes
    from ..training.finetuning import finetune as run
    from ..training.randomness import seed_everything

    finetune_config = FinetuneConfig(**training)
    seed_everything(finetune_config.seed)  # random weights and heads
    patch_config = options.patch_config(keep_ratio, representative, paper, selection, schedule, start, stages)
    folder = output or Path(f"evopatch-finetune-{re.sub(r'[^A-Za-z0-9_.-]+', '-', model).strip('-')}")
    preprocessing = Preprocessing(options.parse_channels(mean), options.parse_channels(std), crop_pct, image_size)
    classifier = open_classifier(model, checkpoint, num_classes, preprocessing, pretrained)
    splits = _open(data, eval_data)
    taught_by = _teacher(teacher, teacher_checkpoint, classifier)
    old_classes = count_classes(classifier.model)
    new_head = labels and splits.classes not in (None, old_classes)
    if new_head:
        assert splits.classes is not None
        _say(f"{data} has {splits.classes} classes: {model} gets a new head in place of the one for {old_classes}")
        reset_head(classifier.model, splits.classes)
    from_random = new_head or (not pretrained and checkpoint is None)
    if taught_by is None and from_random and (not labels or finetune_config.objective == "distillation"):
        raise ConfigError("a model with random weights can't teach itself: give --teacher, or train with labels")
    if finetune_config.trainable != "all" and from_random:
        raise ConfigError(f"--trainable {finetune_config.trainable} would leave random weights as they are: use all")
    augmentation = Augmentation(_pair(scale), hflip, color_jitter, auto_augment, random_erasing)
    splits.train.transform = training_transform(classifier, augmentation)
    if not labels:
        splits.train.labels = None
    apply(classifier.model, config=patch_config)
    _save_settings(folder, ctx)
    try:
        result = run(
            classifier.model,
            _subset(splits.train, rows),
            None if splits.evaluation is None else _evaluated(splits.evaluation, classifier, eval_rows),
            finetune_config,
            teacher=taught_by,
            output=folder,
            resume=resume,
            progress=True,
        )
    except TrainingInterruptedError as error:
        how = f"evopatch finetune --config {folder / SETTINGS} --resume"
        raise TrainingError(f"{str(error).split('. Call again')[0]}. To go on: {how}") from None
    processes.end()
    if not processes.is_main():
        return
    save_pretrained(classifier.model, folder / "model")
    console.print(_table(model, result, from_random))
    console.print(_summary(result, folder), highlight=False, soft_wrap=True)


def _open(data: str, eval_data: str | None) -> _Splits:
    from ..sources.images import open_evaluation, open_images, open_part

    train = open_images(data)
    evaluation = open_part(data, "eval") if eval_data is None else open_evaluation(eval_data)
    if evaluation is not None and train.class_names is not None:
        evaluation.number_as(train.class_names, eval_data or data)
    return _Splits(train, evaluation, train.classes)


def _subset(images: Any, rows: str | None) -> Any:
    from torch.utils.data import Subset

    return images if rows is None else Subset(images, options.parse_rows(rows, len(images)))


def _evaluated(images: Any, classifier: Any, rows: str | None) -> Any:
    images.transform = classifier.transform
    return _subset(images, rows)


def _pair(text: str) -> tuple[float, float]:
    value = options.parse_ratios(text)
    if not isinstance(value, tuple) or len(value) != 2 or not 0 < value[0] <= value[1] <= 1:
        raise typer.BadParameter(f"--scale {text}: expected two shares in (0, 1], as in 0.35,1")
    return value


def _teacher(name: str | None, checkpoint: Path | None, student: Any) -> Any:
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


def _save_settings(folder: Path, ctx: typer.Context) -> None:
    import tomli_w

    from ..training import processes

    values = {
        name: value for name, value in ctx.params.items() if value is not None and name not in ("config", "resume")
    }
    values |= {"output": folder}
    plain = {
        name: value if isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))
        for name, value in values.items()
    }
    # A run that is resumed, or refused since there is one already, keeps its own.
    if checkpoints.steps(folder):
        if ctx.params["resume"]:
            _check_settings(folder / SETTINGS, plain)
    elif processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(tomli_w.dumps(dict(sorted(plain.items()))))


def _check_settings(file: Path, given: dict[str, Any]) -> None:
    if not file.is_file():
        return
    saved = options.read_toml(file)
    names = sorted((saved.keys() | given.keys()) - {"output"} - MAY_DIFFER)
    different = [name for name in names if saved.get(name) != given.get(name)]
    if different:
        raise ConfigError(
            f"the run in {file.parent} has other options: "
            + ", ".join(f"{name} was {saved.get(name)!r} and is {given.get(name)!r} now" for name in different)
            + f". Resume it with --config {file}, or start anew in another --output"
        )


def _say(text: str) -> None:
    from ..training import processes

    if processes.is_main():
        errors.print(text, highlight=False, soft_wrap=True)


def _table(model: str, result: FinetuneResult, from_random: bool) -> Any:
    title = f"{model}, batch {TIMED_BATCH} for images/s"
    if result.after is not None:
        title = f"{model}, {result.after.images} images, batch {TIMED_BATCH} for images/s"
    table = table_of(title, ("",), ("top-1 %", "agree %", "KL", "FLOPs", "images/s"))
    rows = (
        ("unpatched", result.unpatched, result.speed.unpatched),
        ("patched, before", result.before, result.speed.patched),
        ("patched, trained", result.after, result.speed.patched),
    )
    for name, found, speed in rows:
        cells = ("-",) * 4
        if found is not None:
            # Beside random weights, being like the model before training says nothing.
            alike = ("-", "-") if from_random else (percent(found.agreement), f"{found.kl:.4f}")
            cells = (percent(found.top1), *alike, f"{found.flops:.3f}")
        table.add_row(name, *cells, f"{speed:.1f}")
    return table


def _summary(result: FinetuneResult, folder: Path) -> str:
    lines = [
        f"{result.steps} steps in {result.seconds / 60:.1f} minutes, {result.images_per_second:.1f} images/s; one "
        f"training step is {result.training_speed.ratio:.2f}x as fast as unpatched, one forward "
        f"{result.speed.ratio:.2f}x",
    ]
    if result.after is None:
        lines.append("nothing was evaluated: give --eval-data")
    unreadable = (*result.unreadable, *result.unreadable_evaluation)
    if unreadable:
        lines.append(f"{len(unreadable)} unreadable image(s) skipped: {', '.join(unreadable[:5])}")
    lines.append(f"the trained model: evopatch.load_pretrained('{folder / 'model'}'); log, settings, result: {folder}")
    return "\n".join(lines)
