"""The `evopatch` command."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import EvoConfig
from .errors import ConfigError, DataError, EvoPatchError, UnsupportedModelError
from .progress import errors, progress_bar

app = typer.Typer(
    help="Slow-fast token evolution for the vision transformers you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()


class RepresentativeName(str, Enum):
    """What stands in for the fast tokens."""

    matched = "matched"
    single = "single"
    none = "none"


class Precision(str, Enum):
    """The model's floating-point type."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def main() -> None:
    """Run the command; an error is one message, not a stack trace. Exit codes: 0 done, 2 bad usage, 1 failed."""
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except EvoPatchError as error:
        _fail(error, 1)
    except ModuleNotFoundError as error:
        _fail(f"{error}; pip install 'evopatch[all]' brings what the commands need", 1)


def _fail(error: object, code: int) -> None:
    errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    raise SystemExit(code)


def parse_ratios(text: str) -> float | tuple[float, ...]:
    """`0.5`, or one per run as in `0.6,0.35`."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"'{text}': expected a number, or numbers separated by commas") from None
    return values[0] if len(values) == 1 else values


def _floats(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    value = parse_ratios(text)
    if not isinstance(value, tuple):
        return (value,) * 3
    if len(value) != 3:
        raise typer.BadParameter(f"'{text}': expected one number or three")
    return value


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Option(
            help="A timm name, such as deit_tiny_patch16_224, or a transformers model: a folder, or a hub name."
        ),
    ],
    data: Annotated[Path, typer.Option(help="A .parquet file with `image` and `label`, or an ImageFolder directory.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights in timm's layout. Default: timm's pretrained ones.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the checkpoint's head.")] = None,
    keep_ratio: Annotated[
        list[str] | None,
        typer.Option(help="Mean share of slow tokens, or one per run (0.6,0.35). Repeat for several. Default 0.5."),
    ] = None,
    representative: Annotated[
        list[RepresentativeName] | None, typer.Option(help="Repeat for several. Default matched.")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's setting: single, constant keep ratio.")] = False,
    selection: Annotated[str, typer.Option(help="stage or layer.")] = "stage",
    schedule: Annotated[str | None, typer.Option(help="taper or constant.")] = None,
    start: Annotated[int | None, typer.Option(help="First selecting block.")] = None,
    stages: Annotated[str | None, typer.Option(help="Number of runs, or the first block of each (4,8).")] = None,
    mean: Annotated[str | None, typer.Option(help="Normalisation mean, one number or three.")] = None,
    std: Annotated[str | None, typer.Option(help="Normalisation standard deviation, one number or three.")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the image kept by the centre crop.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Input size in pixels. Default: the model's.")] = None,
    rows: Annotated[str | None, typer.Option(help="Only these images, as in 650: or 0:100.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    workers: Annotated[int, typer.Option(min=0, help="Data-loading processes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    dtype: Annotated[Precision, typer.Option()] = Precision.float32,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Top-1, top-5, agreement with and KL to the unpatched model, and FLOPs, without training.

    The model's own preprocessing is used unless overridden.

        evopatch evaluate --model deit_tiny_patch16_224 --data val/ --keep-ratio 0.7 --keep-ratio 0.5
    """
    import torch
    from torch.utils.data import DataLoader, Subset

    from .data import open_images
    from .evaluate import evaluate as run
    from .models import Preprocessing, open_classifier
    from .patch import apply

    if json_out is not None and not json_out.parent.is_dir():
        raise DataError(f"{json_out.parent}: no such folder for the results; create it or give another --json")
    configs = _configs(keep_ratio, representative, paper, selection, schedule, start, stages)
    preprocessing = Preprocessing(_floats(mean), _floats(std), crop_pct, image_size)
    classifier = open_classifier(model, checkpoint, num_classes, preprocessing)
    network = classifier.model.to(device, getattr(torch, dtype.value))
    apply(network, config=configs[0])
    dataset: Any = open_images(data, classifier.transform)
    if rows is not None:
        dataset = Subset(dataset, _rows(rows, len(dataset)))
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    with progress_bar(f"{model}, {len(configs)} setting(s)", len(dataset)) as advance:
        results = run(network, loader, configs, classifier.input_size, on_batch=advance)
    table = Table(title=f"{model}, {results[0].images} images, {dtype.value}, no training")
    table.add_column("representative", no_wrap=True)
    table.add_column("keep\nratio", justify="right")
    for column in ("FLOPs", "FLOPs of\nblocks", "top-1\n%", "top-5\n%", "agree\n%", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        unpatched = result is results[0]
        table.add_row(
            "unpatched" if unpatched else result.config.representative,
            "" if unpatched else _ratio_text(result.config),
            f"{result.flops:.3f}",
            f"{result.blocks_flops:.3f}",
            f"{result.top1:.2f}",
            f"{result.top5:.2f}",
            f"{result.agreement:.2f}",
            f"{result.kl:.4f}",
        )
    console.print(table)
    if json_out is not None:
        json_out.write_text(json.dumps([result.to_dict() for result in results], indent=2) + "\n")


def _configs(
    keep_ratio: list[str] | None,
    representative: list[RepresentativeName] | None,
    paper: bool,
    selection: str,
    schedule: str | None,
    start: int | None,
    stages: str | None,
) -> list[EvoConfig]:
    base: dict[str, Any] = EvoConfig.paper().to_dict() if paper else EvoConfig().to_dict()
    base.update(selection=selection, start=start)
    if schedule is not None:
        base["schedule"] = schedule
    if stages is not None:
        firsts = _integers(stages.split(","), stages)
        base["stages"] = firsts[0] if len(firsts) == 1 else firsts
    names = [r.value for r in representative] if representative else [base["representative"]]
    ratios = [parse_ratios(text) for text in keep_ratio or ["0.5"]]
    return [
        EvoConfig.from_dict({**base, "representative": name, "keep_ratio": ratio}) for name in names for ratio in ratios
    ]


def _rows(text: str, total: int) -> range:
    first, separator, last = text.partition(":")
    if not separator:
        raise typer.BadParameter(f"--rows {text}: expected FIRST:LAST, either of them may be left out")
    begin, end = _integers([first or "0", last or str(total)], text)
    return range(total)[begin:end]


def _integers(parts: list[str], text: str) -> list[int]:
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise typer.BadParameter(f"'{text}': expected whole numbers") from None


def _ratio_text(config: EvoConfig) -> str:
    ratio = config.keep_ratio
    return ", ".join(f"{r:g}" for r in ratio) if isinstance(ratio, tuple) else f"{ratio:g}"


@app.command(name="list")
def list_models(
    pattern: Annotated[str, typer.Argument(help="A timm wildcard. Default: the ViT and DeiT families.")] = "",
) -> None:
    """Names of the timm models that `evopatch.apply` takes.

    evopatch list 'deit*'
    """
    import timm

    from .patch import supported

    names = timm.list_models([pattern] if pattern else ["vit_*", "deit*"])
    if not names:
        raise UnsupportedModelError(f"no timm model is named like '{pattern}'")
    taken = []
    with progress_bar("checking", len(names)) as advance:
        for name in names:
            if supported(timm.create_model(name, device="meta")):
                taken.append(name)
            advance()
    for name in taken:
        console.print(name, highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the picture of the token selection goes.")] = Path(
        "evopatch-demo.png"
    ),
) -> None:
    """Train a small ViT on scikit-learn's handwritten digits, patch it, compare. No network, a few minutes.

    evopatch demo
    """
    import matplotlib  # noqa: F401, before minutes of training

    from .demo import run

    if not out.parent.is_dir():
        raise DataError(f"{out.parent}: no such folder for the picture; create it or give another --out")
    run(out, console, progress_bar)
