"""Whether a patched model keeps its promises here: on this device, in this type, with these versions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..patching.given_images import check_images, run_on
from ..patching.handle import Patched
from .outputs import compared
from .profiling import UNPATCHED

Result = Literal["ok", "failed", "skipped"]

HALF = (torch.bfloat16, torch.float16)
DRAWS = 8
NOISE = 2
"""Of so many rounding errors of an image's type."""
SLACK = 4
"""So many times as far as rounding moves an image of the unpatched model, it may move one of the patched one."""


@dataclass(frozen=True)
class Check:
    """One promise."""

    name: str
    result: Result
    figure: float | None
    """What was found: the largest difference between two outputs, relative to the largest output; of finite results the
    number of values that aren't. None where nothing was computed."""
    bound: float | None
    """The most that `figure` may be."""
    note: str = ""
    """Why it was skipped, or failed without a figure, or what the bound allows for."""


@dataclass(frozen=True)
class Verification:
    """All checks, and what they were made on."""

    checks: tuple[Check, ...]
    device: str
    dtype: str
    images: int
    torch: str

    @property
    def passed(self) -> bool:
        """Whether no check failed. One that was skipped says nothing."""
        return all(check.result != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        rows = [f"{c.result:8}{c.name:{width}}  {_figures(c)}  {c.note}".rstrip() for c in self.checks]
        return "\n".join((*rows, f"{self.device}, {self.dtype}, {self.images} images, torch {self.torch}"))


def verify(model: nn.Module, images: Tensor, *, compile: bool | str = False) -> Verification:
    """Check what evopatch promises of a patched model, on the device and in the type that the model has.

    - Keep ratio 1 equals the unpatched model, to the bit.
    - Another run gives the same, to the bit, also after other images.
    - An image's output doesn't depend on its neighbours in a batch: to the bit in a batch of the same size, up to
      rounding where it is alone.
    - No output is NaN or infinite, in the model's type, bfloat16 and float16, where the unpatched model's are finite.
    - Compiled equals eager, up to rounding.

    Where the unpatched model itself doesn't repeat its outputs to the bit, the patched one may differ as much.

    Kernels for another batch size, or compiled ones, round differently in the unpatched model too. In a patched one
    rounding may also decide between two tokens of nearly equal score, and the image moves further then. So an image may
    move four times as far as any does in the unpatched model, between the same kernels or when noise as large as two
    rounding errors is added to the pixels; or as far as it moves itself in the patched model under such noise, in the
    worst of eight draws. The note counts the images for which the latter was needed.

    Args:
        model: A patched model; it stays as it is, copies on the same weights are run in eval mode.
        images: `(B, 3, height, width)`, at least 2, as the model expects them; 8 or more real ones tell most.
        compile: Also compile, which takes a minute or more. A string is torch.compile's `backend`.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        DataError: If `images` are no such tensor, fewer than 2, or not finite, or the unpatched model doesn't run on
            them, or nothing is finite that it makes of them.
        UnsupportedModelError: If the model's outputs are nothing that can be compared.
    """
    patched = Patched(model)
    like = next(patched.model.parameters())
    check_images(images, least=2)
    if not images.is_floating_point() or not images.isfinite().all():
        raise DataError(
            f"images {tuple(images.shape)} {images.dtype}: expected finite floating-point numbers, normalised for the "
            "model"
        )
    sides = _Sides(patched, images.detach().to(like.device, like.dtype))
    with torch.no_grad():
        _check_outputs(sides)
        checks = (
            _keep_ratio_one(sides),
            _repeated(sides),
            _neighbours(sides),
            _alone(sides),
            *(_finite(sides, dtype) for dtype in dict.fromkeys((like.dtype, *HALF))),
            _compiled(sides, compile),
        )
    device = torch.cuda.get_device_name(like.device) if like.is_cuda else str(like.device)
    return Verification(checks, device, _name(like.dtype), len(images), torch.__version__)


def _check_outputs(sides: _Sides) -> None:
    # Of NaN everything is equal to everything.
    if not any(values.isfinite().any() for values in sides.stock_expected):
        raise DataError(
            f"no output of the unpatched {type(sides.stock).__name__} is finite on these images in "
            f"{_name(sides.images.dtype)}: nothing can be compared. Give images as the model expects them, or a model "
            "with sound weights in a type with their range"
        )


class _Sides:
    """The patched model and the unpatched one, copies in eval mode, and how far rounding moves the images in them."""

    def __init__(self, patched: Patched[nn.Module], images: Tensor) -> None:
        self.patched = patched
        self.images = images
        self.others = images.roll(1, 0)
        self.own, self.stock = patched.copy().eval(), patched.original().eval()

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        return _run(self.own, self.images)

    @cached_property
    def stock_expected(self) -> tuple[Tensor, ...]:
        return compared(run_on(self.stock, self.images), self.stock).values

    @cached_property
    def repeats(self) -> tuple[float, float]:
        """The largest difference between runs, of both."""
        return self._repeat(self.own, self.expected), self._repeat(self.stock, self.stock_expected)

    def _repeat(self, model: nn.Module, first: tuple[Tensor, ...]) -> float:
        differences = [_difference(_run(model, self.images), first).max().item()]
        _run(model, self.others)  # what these leave in the model would show in the run after them
        differences.append(_difference(_run(model, self.images), first).max().item())
        return max(differences)

    @cached_property
    def moves(self) -> tuple[Tensor, Tensor]:
        """`(B,)`, how far each image moves under noise of the size of rounding errors, in both."""
        generator = torch.Generator().manual_seed(0)
        size = NOISE * torch.finfo(self.images.dtype).eps * self.images.float().abs().mean()
        own, stock = torch.zeros(2, len(self.images), dtype=torch.float64)
        for _ in range(DRAWS):
            noise = torch.randn(self.images.shape, generator=generator).to(self.images.device)
            noisy = (self.images.float() + size * noise).to(self.images.dtype)
            own = torch.maximum(own, _difference(_run(self.own, noisy), self.expected))
            stock = torch.maximum(stock, _difference(_run(self.stock, noisy), self.stock_expected))
        return own, stock

    def up_to_rounding(self, name: str, own: Tensor, stock: Tensor) -> Check:
        """
        Args:
            name: Of the check.
            own: `(B,)`, how far the patched model moved each image.
            stock: `(B,)`, how far the unpatched one did.
        """
        own_moves, stock_moves = (moves.where(moves.isfinite(), 0.0) for moves in self.moves)
        rounding = SLACK * torch.maximum(stock.where(stock.isfinite(), 0.0), stock_moves).max()
        allowed = torch.maximum(rounding, own_moves)
        # Where everything is equal the bound may be 0, and the share of it that was used 0 / 0.
        worst = int((own / allowed).nan_to_num(nan=0.0, posinf=torch.inf).argmax())
        turned = int(((own > rounding) & (own <= allowed)).sum())
        note = f"{turned} of {len(own)} images near a tie" if turned else ""
        return _compare(name, own[worst].item(), allowed[worst].item(), note)


def _keep_ratio_one(sides: _Sides) -> Check:
    found = _run(sides.patched.at(UNPATCHED), sides.images)
    difference = _difference(found, sides.stock_expected).max().item()
    return _compare("keep ratio 1 is the unpatched model", difference, sides.repeats[1], _inexact(sides))


def _repeated(sides: _Sides) -> Check:
    own, stock = sides.repeats
    return _compare("another run gives the same", own, stock, _inexact(sides))


def _inexact(sides: _Sides) -> str:
    return "the unpatched model doesn't repeat itself to the bit" if sides.repeats[1] else ""


def _neighbours(sides: _Sides) -> Check:
    name = "other neighbours change nothing"
    own, stock = (
        _among_others(sides, sides.own, sides.expected),
        _among_others(sides, sides.stock, sides.stock_expected),
    )
    if stock.max() == 0:
        # What differs from run to run is counted there.
        return _compare(name, own.max().item(), sides.repeats[0])
    return sides.up_to_rounding(name, own, stock)


def _among_others(sides: _Sides, model: nn.Module, expected: tuple[Tensor, ...]) -> Tensor:
    differences = torch.zeros(len(sides.images), dtype=torch.float64)
    for first in (0, 1):
        mixed = sides.others.clone()
        mixed[first::2] = sides.images[first::2]
        differences[first::2] = _difference(_run(model, mixed), expected)[first::2]
    return differences


def _alone(sides: _Sides) -> Check:
    def alone(model: nn.Module) -> tuple[Tensor, ...]:
        runs = [_run(model, image) for image in sides.images.split(1)]
        return tuple(torch.cat(values) for values in zip(*runs, strict=True))

    own, stock = alone(sides.own), alone(sides.stock)
    own_difference, stock_difference = _difference(own, sides.expected), _difference(stock, sides.stock_expected)
    return sides.up_to_rounding("an image alone gives the same", own_difference, stock_difference)


def _finite(sides: _Sides, dtype: torch.dtype) -> Check:
    def wrong(model: nn.Module) -> int:
        return sum(int((~values.isfinite()).sum()) for values in _run(model.eval(), sides.images.to(dtype)))

    name = f"finite in {_name(dtype)}"
    try:
        stock = wrong(sides.patched.original().to(dtype))
    except RuntimeError as error:
        return Check(name, "skipped", None, None, f"the unpatched model doesn't run: {_first_line(error)}")
    if stock:
        return Check(name, "skipped", None, None, f"{stock} values of the unpatched model aren't finite")
    return _compare(name, wrong(sides.patched.copy().to(dtype)), 0)


def _compiled(sides: _Sides, wanted: bool | str) -> Check:
    name = "compiled gives the same"
    if not wanted:
        return Check(name, "skipped", None, None, "not asked for")
    backend = wanted if isinstance(wanted, str) else "inductor"

    def compiled(model: nn.Module) -> tuple[Tensor, ...]:
        return _run(cast(nn.Module, torch.compile(model, dynamic=False, backend=backend)), sides.images)

    try:
        stock = _difference(compiled(sides.patched.original().eval()), sides.stock_expected)
    except Exception as error:  # whatever a compiler raises
        return Check(name, "skipped", None, None, f"the unpatched model doesn't compile: {_first_line(error)}")
    try:
        own = _difference(compiled(sides.patched.copy().eval()), sides.expected)
    except Exception as error:
        return Check(name, "failed", None, None, f"it doesn't compile: {_first_line(error)}")
    return sides.up_to_rounding(name, own, stock)


def _compare(name: str, figure: float, bound: float, note: str = "") -> Check:
    return Check(name, "ok" if figure <= bound else "failed", figure, bound, note)


def _run(model: Callable[[Tensor], Any], images: Tensor) -> tuple[Tensor, ...]:
    return compared(model(images), cast(nn.Module, model)).values


def _difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Tensor:
    """`(B,)` float64: of each image the largest, relative to the largest output of all; infinite where one isn't
    finite that was, or was something else."""
    largest = torch.zeros(len(expected[0]), dtype=torch.float64)
    for own, whole in zip(found, expected, strict=True):
        same = (own == whole) | (own.isnan() & whole.isnan())
        apart = (own.double() - whole.double()).abs().where(~same, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        scale = whole.double().abs().where(whole.isfinite(), 0.0).max().clamp_min(torch.finfo(torch.float32).tiny)
        largest = torch.maximum(largest, (apart / scale).flatten(1).amax(1).cpu())
    return largest


def _figures(check: Check) -> str:
    return "" if check.figure is None else f"{check.figure:.2g} (at most {check.bound:.2g})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
