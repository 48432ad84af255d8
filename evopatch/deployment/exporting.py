"""`evopatch.export`: a patched model as a file for another runtime, which is run there before it is left in place."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..durable import temporary_in
from ..errors import ConfigError, DataError, EvoPatchError, ExportError
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
    int8: Tensor | bool | None = None,
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
            reported is too good. `pt2` looks at none and takes True as well; None or False for a file in float32.
        benchmark: Time it against the unpatched model's file, in turn.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        ConfigError: If the format can't hold such a model, or a setting isn't one.
        DataError: If there are too few images or they are of another shape, or there is a folder where the file goes.
        UnsupportedModelError: If the model doesn't return tensors with one entry per image.
        ExportError: If the model can't be run on the images or the format's library can't convert it, or the file is
            wrong.
        ModuleNotFoundError: If that library is missing.
    """
    if format not in FORMS:
        raise ConfigError(f"format='{format}': expected one of {', '.join(FORMS)}")
    target, path = _Target(FORMS[format], batch_size, any_size, half, _wanted(int8)), Path(path)
    target.check(path, images)
    # What the user's code computes in lower precision is neither converted nor compared.
    with torch.autocast("cpu", enabled=False):
        return _export(target, path, Patched(model), images.cpu().float(), benchmark)


def _export(target: _Target, path: Path, patched: Patched[nn.Module], images: Tensor, benchmark: bool) -> Export:
    own = patched.copy().eval().cpu().float()
    other_size = target.other_size(patched, own, images)
    with temporary_in(path.parent) as folder:
        written = target.write(own, images, other_size, folder / "patched", path.name)
        verification = speed = None
        if (run := target.open(written)) is not None:
            verification = target.verify(run, own, batches_of(images, target.batch_size, other_size), path.name)
        if run is not None and benchmark:
            original = patched.original().eval().cpu().float()
            unpatched = target.open(target.write(original, images, other_size, folder / "unpatched", path.name))
            assert unpatched is not None
            batch = images[: target.batch_size]
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
    int8: Tensor | bool
    """Images to quantise by; True for a format that looks at none, False for a file in float32."""

    def check(self, path: Path, images: Tensor) -> None:
        self.form.check(self.batch_size is None, self.any_size, self.int8 is not False, self.half)
        self.form.check_target(path)
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: expected 1 or more, or None for any")
        least = max(2, self.batch_size or 0)
        if not isinstance(images, Tensor) or images.dim() != 4 or len(images) < least:
            raise DataError(
                f"images: {_kind(images)}: expected a tensor (M, C, height, width) with {least} images or more; "
                "torch.stack makes one of a list"
            )
        if isinstance(self.int8, Tensor):
            same = images.shape[1:2] if self.any_size else images.shape[1:]
            if self.int8.dim() != 4 or not len(self.int8) or self.int8.shape[1 : 1 + len(same)] != same:
                raise DataError(
                    f"int8: {_kind(self.int8)}: expected (M, C, height, width) as images have, {tuple(images.shape)}, "
                    "with one image or more; give them the same transform"
                )
        elif self.int8 and self.form.quantised_by_images:
            raise ConfigError(f"int8=True: format {self.form.name} is quantised by images: give int8=images")

    def other_size(self, patched: Patched[nn.Module], own: nn.Module, images: Tensor) -> tuple[int, int] | None:
        """Height and width that the file is traced and verified with, beside those of the images: another number of
        patches up and across, one more and one less. None for a file of one size."""
        model = ImageModel(own, self.any_size)
        _output_names(model, images[:2])
        if not self.any_size:
            return None
        height, width = images.shape[2:]
        rows, columns = next(iter(patched.hosts.values())).grids((height, width))[0]
        other = height + height // rows, max(width - width // columns, width // columns)
        try:
            model(torch.zeros(1, images.shape[1], *other))
        except Exception as error:
            raise ConfigError(
                f"any_size: {type(own).__qualname__} doesn't take an image of {other[0]} by {other[1]} px "
                f"({' '.join(str(error).split())[:200]}): expected a model for any size, of timm with "
                "dynamic_img_size=True"
            ) from error
        return other

    def write(
        self, model: nn.Module, images: Tensor, other_size: tuple[int, int] | None, folder: Path, file_name: str
    ) -> Path:
        """Into a new folder of its own, as a format may make several files."""
        folder.mkdir()
        # Two images, or the exporter takes the batch's 1 for a constant.
        example = images[: self.batch_size or 2]
        if other_size is not None:
            # A height that is the width, or that the model has by itself, would be taken for a constant as well.
            example = F.interpolate(example, other_size, mode="bilinear")
        module = ImageModel(model, self.any_size).eval()
        names = _output_names(module, example)
        if self.half and not self.form.own_half:
            module, example = copy.deepcopy(module).half(), example.half()
        free = self.batch_size is None, self.any_size
        by = self.int8.cpu().float() if isinstance(self.int8, Tensor) else None
        written = folder / file_name
        try:
            self.form.write(Conversion(module, example, names, *free, self.half, self.int8 is not False, by), written)
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
        if self.int8 is not False:
            return verify_int8(run, eager, batches, where, names)
        if self.half:
            return verify_half(run, eager, _in_half(copy.deepcopy(eager).half()), batches, where, names)
        return verify(run, eager, batches, where, names)


def _in_half(run: Run) -> Run:
    return lambda images: tuple(value.float() for value in run(images.half()))


def _wanted(int8: Tensor | bool | None) -> Tensor | bool:
    if int8 is None or isinstance(int8, (bool, Tensor)):
        return False if int8 is None else int8
    raise DataError(f"int8: {_kind(int8)}: expected images as a tensor (M, C, height, width), True, or None")


def _output_names(model: ImageModel, images: Tensor) -> list[str]:
    """Of a model's outputs for images `(B, C, height, width)`, in its first run."""
    try:
        return model.output_names(images)
    except EvoPatchError:
        raise
    except Exception as error:
        raise ExportError(
            f"{type(model.model).__qualname__} doesn't run on images of shape {tuple(images.shape)} in float32, "
            f"without other arguments: {type(error).__name__}: {' '.join(str(error).split())[:400]}. Expected a model "
            "that takes images only, and images of its channels and size; give those, or the part that takes images"
        ) from error


def _kind(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


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
