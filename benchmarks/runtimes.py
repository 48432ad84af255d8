"""Speed of patched models against unpatched ones where models are served, by runtime: alternating, one line per cell.

python benchmarks/runtimes.py deit_small_patch16_224 swin_tiny_patch4_window7_224 vit_small_patch14_dinov2@224
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.metadata
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import evopatch
from evopatch.deployment.exporting import FORMS
from evopatch.measure.profiling import count_flops
from evopatch.measure.timing import alternate

FILES = ("onnx", "openvino", "executorch")
RUNTIMES = ("eager", "torch.compile", "AOTInductor", *FILES)
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "executorch")


def running(runtime: str, model: nn.Module, images: Tensor, folder: Path) -> Callable[[Tensor], object]:
    """A patched model as it is now, in one runtime.

    Args:
        runtime: One of `RUNTIMES`.
        model: In eval mode.
        images: `(B, 3, height, width)`, the only batch that it will get.
        folder: For its files.
    """
    if runtime == "eager":
        return model
    if runtime == "torch.compile":
        return torch.compile(model, fullgraph=True, dynamic=False)
    if runtime == "AOTInductor":
        inductor: Any = torch._inductor
        package = inductor.aoti_compile_and_package(
            torch.export.export(model, (images,)), package_path=str(folder / "model.pt2")
        )
        return inductor.aoti_load_package(package)
    opened = FORMS[runtime].open
    assert opened is not None
    path = folder / f"model{FORMS[runtime].ending}"
    shown = images if len(images) > 1 else torch.cat([images, images.flip(3)])
    return opened(evopatch.export(model, path, runtime, images=shown, batch_size=len(images)).path)


def created(name: str) -> Any:
    """A timm model of random weights, in eval mode.

    Args:
        name: Its name, with `@` and an image size if that isn't the model's own.
    """
    name, _, size = name.partition("@")
    return timm.create_model(name, **({"img_size": int(size)} if size else {})).eval()


@torch.no_grad()
def cell(name: str, runtime: str, batch_size: int, keep_ratio: float, rounds: int, foresight: bool = False) -> str:
    """A row of the table.

    Args:
        name: A timm name, with `@` and an image size if it isn't the model's own.
        runtime: One of `RUNTIMES`.
        batch_size: The only one of its files.
        keep_ratio: Of the patched side.
        rounds: Timed calls of each side.
        foresight: Fit it, on noise: what it costs doesn't depend on what it has learned.
    """
    torch.manual_seed(0)
    unpatched = created(name)
    images = torch.randn(batch_size, 3, *unpatched.patch_embed.img_size)
    flops, calls = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("unpatched", "patched"):
            model = copy.deepcopy(unpatched)
            # A file is written of patched models only; at a keep ratio of 1 one is what it was unpatched.
            if side == "patched" or runtime in FILES:
                shown = torch.randn(16, *images.shape[1:]) if foresight else None
                evopatch.apply(model, keep_ratio, images=shown)
                evopatch.set_keep_ratio(model, keep_ratio if side == "patched" else 1.0)
            flops[side] = count_flops(partial(model, images))[0]
            place = Path(folder) / side
            place.mkdir()
            calls[side] = partial(running(runtime, model, images, place), images)
        seconds = alternate(calls, images.device, rounds, warm_up=3)
    ratios = [slow / fast for slow, fast in zip(seconds["unpatched"], seconds["patched"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    relative = flops["patched"] / flops["unpatched"]
    rates = " | ".join(f"{batch_size / statistics.median(seconds[side]):.1f}" for side in calls)
    return (
        f"| {name} | {batch_size} | {runtime} | {rates} | {relative:.3f} | {middle:.2f} | {low:.2f}-{high:.2f} | "
        f"{middle * relative:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="a timm name, with @ and an image size if it isn't the model's own")
    parser.add_argument("--runtime", choices=RUNTIMES, action="append", help="repeat for several; default all")
    parser.add_argument("--batch-size", type=int, action="append", help="repeat for several; default 1 and 16")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--foresight", action="store_true", help="of the patched side, see docs/concepts.md")
    asked = parser.parse_args()
    versions = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    settings = f"keep_ratio={asked.keep_ratio:g}{', foresight' * asked.foresight}"
    print(f"CPU, {torch.get_num_threads()} threads, float32, {settings}; {', '.join(versions)}\n")
    print("| model | batch | runtime | unpatched, images/s | patched | FLOPs | speed-up | quartiles | efficiency |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in asked.model:
        for runtime in asked.runtime or RUNTIMES:
            for batch_size in asked.batch_size or (1, 16):
                row = cell(name, runtime, batch_size, asked.keep_ratio, asked.rounds, asked.foresight)
                print(row, flush=True)
                torch._dynamo.reset()
                gc.collect()


if __name__ == "__main__":
    main()
