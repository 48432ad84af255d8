"""`evopatch.export`: a patched model as a file for another runtime, which is run there before it is left in place."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, ExportError
from ..measure.timing import Speed, compare
from ..patching.handle import Patched
from .checking import Verification, batches_of, verify, verify_half, verify_int8
from .conversion import Conversion, ImageModel
from .coreml_form import COREML
from .executorch_form import EXECUTORCH
from .form import Form, Run, is_package
from .onnx_form import ONNX
from .openvino_form import OPENVINO
from .torch_forms import PROGRAM, SCRIPT

FORMS = {form.name: form for form in (ONNX, OPENVINO, EXECUTORCH, PROGRAM, SCRIPT, COREML)}
"""By what `format=` calls them."""
ROUNDS = 20


@dataclass(frozen=True)
class Export:
    """A file that was written."""

    path: Path
    files: tuple[Path, ...]
    """All that belong together, the one at `path` among them."""
    size: int
    """Bytes in all of them."""
    verification: Verification | None
    """None where the format's runtime isn't to be had here: Core ML's."""
    speed: Speed | None
    """In the format's runtime, if it was asked for."""


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "onnx",
    *,
    images: Tensor,
    batch_size: int | None = None,
    any_size: bool = False,
    half: bool = False,
    int8: Tensor | None = None,
    benchmark: bool = False,
) -> Export:
    """Write a patched model as a file for another runtime, run the file there, and compare it with the model.

    A file that is wrong is removed. Another runtime rounds differently, and where two tokens are nearly equal a choice
    between them may turn; an output that differs must be one that the model itself gives for that image moved by less
    than rounding.

    Args:
        model: A patched model that takes images; it stays as it is. It is written in eval mode and float32.
        path: Of the file, with the format's ending.
        format: `"onnx"`, `"openvino"`, `"executorch"`, `"pt2"`, `"torchscript"` or `"coreml"`.
        images: `(M, C, height, width)`, normalised, of the size that the file is for; two or more, better a few dozen
            real ones. The file is verified with them.
        batch_size: Of all batches that the file is for. None for any.
        any_size: Take images of any size, if the model does.
        half: Values in float16.
        int8: `(M, C, height, width)`: quantise to int8 by these images. Others than `images`, or what is
            reported is too good.
        benchmark: Time it against the unpatched model's file, in turn.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        ConfigError: If the format can't hold such a model, or a setting isn't one.
        DataError: If there are too few images.
        ExportError: If the format's library can't convert the model, or the file is wrong.
        ModuleNotFoundError: If that library is missing.
    """
    if format not in FORMS:
        raise ConfigError(f"format='{format}': expected one of {', '.join(FORMS)}")
    target, path = _Target(FORMS[format], batch_size, any_size, half, int8), Path(path)
    target.check(path, images)
    patched = Patched(model)
    own, images = patched.copy().eval().cpu().float(), images.cpu().float()
    other_size = _other_size(patched, ImageModel(own, any_size), images) if any_size else None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".evopatch-") as folder:
        written = target.write(own, images, Path(folder, "patched"), path.name)
        verification = speed = None
        if (run := target.open(written)) is not None:
            verification = target.verify(run, own, batches_of(images, batch_size, other_size), path.name)
        if run is not None and benchmark:
            original = patched.original().eval().cpu().float()
            unpatched = target.open(target.write(original, images, Path(folder, "unpatched"), path.name))
            assert unpatched is not None
            batch = images[:batch_size]
            speed = compare(partial(run, batch), partial(unpatched, batch), batch, ROUNDS, warm_up=3)
        files = _move(written, path)
    return Export(path, files, sum(map(_size, files)), verification, speed)


@dataclass(frozen=True)
class _Target:
    """What is to be written."""

    form: Form
    batch_size: int | None
    any_size: bool
    half: bool
    int8: Tensor | None

    def check(self, path: Path, images: Tensor) -> None:
        self.form.check(self.batch_size is None, self.any_size, self.int8 is not None, self.half)
        self.form.check_target(path)
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: expected 1 or more, or None for any")
        if images.dim() != 4 or len(images) < max(2, self.batch_size or 0):
            raise DataError(
                f"images of shape {tuple(images.shape)}: expected (M, C, height, width) with two images or more, and a "
                "whole batch"
            )

    def write(self, model: nn.Module, images: Tensor, folder: Path, file_name: str) -> Path:
        """Into a new folder of its own, as a format may make several files."""
        folder.mkdir()
        # Two images, or the exporter takes the batch's 1 for a constant.
        example = images[: self.batch_size or 2]
        module = ImageModel(model, self.any_size).eval()
        names = module.output_names(example)
        if self.half and not self.form.own_half:
            module, example = copy.deepcopy(module).half(), example.half()
        free = self.batch_size is None, self.any_size
        written = folder / file_name
        try:
            self.form.write(Conversion(module, example, names, *free, self.half, self.int8), written)
        except Exception as error:
            text = " ".join(str(error).split())[:600]
            raise ExportError(
                f"{type(model).__qualname__} can't be written as {self.form.name}: {type(error).__name__}: {text}. "
                "Try a fixed size, another version of the format's library, or another format"
            ) from error
        return written

    def open(self, path: Path) -> Run | None:
        """Input and outputs in float32, whatever the file's are; None where there is no runtime."""
        if self.form.open is None:
            return None
        run = self.form.open(path)
        return _in_half(run) if self.half and not self.form.own_half else run

    def verify(self, run: Run, model: nn.Module, batches: list[Tensor], where: str) -> Verification:
        eager = ImageModel(model, self.any_size)
        names = eager.output_names(batches[0])
        if self.int8 is not None:
            return verify_int8(run, eager, batches, where, names)
        if self.half:
            return verify_half(run, eager, _in_half(copy.deepcopy(eager).half()), batches, where, names)
        return verify(run, eager, batches, where, names)


def _in_half(run: Run) -> Run:
    return lambda images: tuple(value.float() for value in run(images.half()))


def _other_size(patched: Patched[nn.Module], model: ImageModel, images: Tensor) -> tuple[int, int]:
    """Another number of patches up and across than these images have: one more, and one less."""
    height, width = images.shape[2:]
    rows, columns = next(iter(patched.hosts.values())).grids((height, width))[0]
    other = height + height // rows, max(width - width // columns, width // columns)
    try:
        model(torch.zeros(1, images.shape[1], *other))
    except Exception as error:
        raise ConfigError(
            f"any_size: {type(model.model).__qualname__} doesn't take an image of {other[0]} by {other[1]} px "
            f"({' '.join(str(error).split())[:200]}): expected a model for any size, of timm with dynamic_img_size=True"
        ) from error
    return other


def _move(written: Path, path: Path) -> tuple[Path, ...]:
    """A file and what lies beside it, to where it was asked for."""
    files = []
    for part in sorted(written.parent.iterdir()):
        target = path.parent / part.name
        if is_package(target):  # a folder isn't replaced by another one
            shutil.rmtree(target)
        os.replace(part, target)
        files.append(target)
    return tuple(files)


def _size(path: Path) -> int:
    parts = path.rglob("*") if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.is_file())
