"""`evopatch benchmark`."""

from __future__ import annotations

import importlib.util
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, cast

import typer

from ..config import EvoConfig
from ..errors import ConfigError, SpeedWarning
from ..progress import progress_bar
from . import options
from .options import Precision
from .patch_options import Asked, patch, several_configs
from .tables import console, megabytes, print_table, table_of, write_json

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from ..measure.comparison import Benchmark


@several_configs
def benchmark(
    model: options.Model,
    *,
    config: options.ConfigFile = None,
    asked: Asked,
    image_size: options.ImageSize = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Repeat for several. Default 16.")] = None,
    device: options.Device = "cpu",
    dtype: Annotated[Precision, typer.Option()] = Precision.float32,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile both sides, with fullgraph=True.")] = False,
    compile_mode: Annotated[
        str | None, typer.Option(help="torch.compile's mode, such as reduce-overhead for CUDA graphs.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward instead of a forward.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Timed forwards of each side.")] = 20,
    warm_up: Annotated[int, typer.Option(min=1, help="Forwards of each side before.")] = 3,
    peer: Annotated[
        Path | None,
        typer.Option(
            help="A Python file with a NAME and a function at_flops(model, image, flops) that returns another method's "
            "version of the unpatched model, at most as many FLOPs per image: timed beside every keep ratio."
        ),
    ] = None,
    json_out: options.JsonOut = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed-up against keep ratio; the ending names the format.")
    ] = None,
) -> None:
    """Images per second, patched and unpatched in turn, against what the FLOPs promise. Random weights, no network.

    evopatch benchmark --model deit_small_patch16_224 --keep-ratio 0.7 --keep-ratio 0.5 --keep-ratio 0.3

    evopatch benchmark --model vit_base_patch16_224 --batch-size 256 --device cuda --dtype bfloat16 --compile
    """
    import torch

    from ..measure.comparison import benchmark as run
    from ..patching.handle import Patched, unpatch
    from ..sources.architectures import open_architecture

    options.check_folder_of(json_out, "--json")
    options.check_picture(plot, "--plot")
    other = None if peer is None else _load(peer)
    network, input_size = open_architecture(model, image_size)
    configs = patch(network, model, asked)
    network = options.place(network, device, dtype)
    image = torch.randn(1, *input_size, device=device, dtype=getattr(torch, dtype.value))
    peers = {} if other is None else _peers(other, unpatch(Patched(network).copy()), image, configs)
    sizes = batch_size or [16]
    results = []
    with progress_bar(f"{model}, {len(configs)} setting(s)", len(sizes) * (rounds + warm_up)) as advance:
        for size in sizes:
            batch = torch.randn(size, *input_size, device=device, dtype=image.dtype)
            results.append(
                run(
                    network, batch, configs, peers=peers, rounds=rounds, warm_up=warm_up,
                    compile=compile_mode or compile_, train=train, on_round=advance,
                )
            )  # fmt: skip
    for result in results:
        print_table(_table(model, result))
    warn_of_slow_float32(device, dtype)
    console.print(
        f"{_conditions(results[0])}. Speed-up: median of the rounds' ratios, and their quartiles. Efficiency: speed-up "
        "times FLOPs, 1 where the promise of the FLOPs is kept. Peak: beyond weights and input.",
        highlight=False,
    )
    write_json(json_out, [result.to_dict() for result in results])
    if plot is not None:
        from ..measure.pictures import draw_speed

        draw_speed(results, plot, model)


class _Peer(Protocol):
    """What a file given by --peer holds."""

    NAME: str

    def at_flops(self, model: nn.Module, image: Tensor, flops: int) -> nn.Module: ...


def warn_of_slow_float32(device: str, dtype: Precision) -> None:
    """Where a GPU doesn't use its tensor cores, nobody runs a model that is to be fast."""
    import torch

    if device.startswith("cuda") and dtype is Precision.float32 and torch.get_float32_matmul_precision() == "highest":
        text = "float32 on a GPU without its tensor cores: use --dtype bfloat16 or float16, as where speed matters"
        warnings.warn(text, SpeedWarning, stacklevel=2)


def _load(path: Path) -> _Peer:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"--peer {path}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "at_flops", None)) or not isinstance(getattr(module, "NAME", None), str):
        raise ConfigError(f"--peer {path}: expected a NAME and a function at_flops(model, image, flops)")
    return cast(_Peer, module)


def _peers(other: _Peer, network: nn.Module, image: Tensor, configs: list[EvoConfig]) -> dict[str, nn.Module]:
    import torch

    from ..measure.comparison import side_names
    from ..measure.profiling import count_flops
    from ..patching.apply import apply
    from ..patching.handle import shared_copy

    found = {}
    for name, config in zip(side_names(configs), configs, strict=True):
        patched = apply(shared_copy(network), config=config)
        with torch.no_grad():
            flops, _ = count_flops(partial(patched, image))
        found[f"{other.NAME} as {name}"] = other.at_flops(network, image, flops)
    return found


def _conditions(result: Benchmark) -> str:
    where = f"cpu, {result.threads} threads" if result.device == "cpu" else result.device
    how = "compiled" if result.compiled else "eager"
    first = {side.attention: side.name for side in reversed(result.sides)}  # who uses a kernel first
    attention = ", ".join(k if len(first) == 1 else f"{k} ({name})" for k, name in reversed(first.items()))
    return f"{where}, {result.dtype}, {how}, attention {attention}, {result.rounds} rounds, torch {result.torch}"


def _table(model: str, result: Benchmark) -> Table:
    what = "forward and backward" if result.train else "forward"
    title = f"{model}, {'x'.join(map(str, result.input_size[1:]))}, batch {result.batch_size}, {what}"
    columns = ("images\n/s", "FLOPs", "speed\n-up", "quartiles", "effi-\nciency", "peak\nMB")
    table = table_of(title, ("",), columns)
    for side in result.sides:
        low, high = side.speed_up_spread
        table.add_row(
            side.name.replace(" as ", "\nas "),
            f"{side.images_per_second:.1f}",
            f"{side.flops:.3f}",
            f"{side.speed_up:.3f}",
            f"{low:.2f}-{high:.2f}",
            f"{side.efficiency:.3f}",
            f"{megabytes(side.memory):.1f}",
        )
    return table
