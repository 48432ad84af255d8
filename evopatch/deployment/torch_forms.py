"""torch's own files: an exported program, and TorchScript for libtorch."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .conversion import Conversion
from .form import Form, Run


def _write_program(conversion: Conversion, path: Path) -> None:
    if conversion.int8:
        from .torch_int8 import quantise

        model = copy.deepcopy(conversion.model)
        quantise(model)
        conversion = replace(conversion, model=model)
    torch.export.save(conversion.program(), path)


def _open_program(path: Path) -> Run:
    module: Any = torch.export.load(path).module()
    return lambda images: tuple(module(images))


def _write_script(conversion: Conversion, path: Path) -> None:
    with warnings.catch_warnings():
        # Of every shape that becomes a constant; the file is run at the sizes that it is for.
        warnings.filterwarnings("ignore", category=cast(Any, torch.jit).TracerWarning)
        module = _OfOneSize(conversion.model, conversion.sizes()).eval()
        traced: Any = torch.jit.trace(module, (conversion.example,), check_trace=False)
    torch.jit.save(traced, str(path))


def _open_script(path: Path) -> Run:
    module: Any = torch.jit.load(str(path))

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(images))

    return run


def _checked(images: Tensor, sizes: list[int]) -> Tensor:
    for axis, length in enumerate(sizes):
        if length != -1 and images.size(axis) != length:
            raise ValueError(f"images of shape {images.shape}: expected {sizes}, where -1 is any; resize them")
    return images


class _OfOneSize(nn.Module):
    """A model that refuses other sizes: a trace takes some that the model wouldn't, and leaves pixels out."""

    def __init__(self, model: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.model, self.sizes = model, sizes
        self.checked: Any = torch.jit.script(_checked)  # or the trace wouldn't hold the condition

    def forward(self, images: Tensor) -> Any:
        return self.model(self.checked(images, self.sizes))


PROGRAM = Form("pt2", ".pt2", (), _write_program, _open_program, quantised_by=("torchao",), quantised_by_images=False)
SCRIPT = Form("torchscript", ".pt", (), _write_script, _open_script, any_size=False)
