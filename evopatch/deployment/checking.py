"""Whether a file gives what the model gives, image by image, and what may explain a difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ExportError
from .comparing import TOLERANCE, Comparison, batch_text, excess_of, values_of
from .form import Run

NOISE = (1e-6, 1e-5, 3e-5)
"""By how much of an image's standard deviation it is moved where its output differs: as much as rounding moves tokens,
and too little to move the output by the tolerance where no choice turns."""
DRAWS = 32
"""Tries at each of these."""
HALF_NOISE = 2.0**-11
"""The same for float16: half of what its values are apart."""
HALF_DRAWS = 8
HALF_BOUND = 2.0
"""How much larger than that of the model itself in float16 the error of a float16 file may be."""
BATCH = 16


@dataclass(frozen=True)
class Verification:
    """A file against its model, run eagerly in float32."""

    images: int
    equal: int
    """How many images have the same outputs, to a tolerance of 1e-4."""
    turned: int
    """How many don't, and have some that the model itself gives when the image is moved by less than rounding: two
    tokens were so nearly equal that the choice between them turned."""
    difference: float
    """The largest, in units of the tolerance; of the equal images it is at most 1."""
    error: float
    """Root mean square of the differences of the worst output, relative to how much it differs between images: 1 is no
    better than the same answer for all. Relative to the output itself where that is the same for all images."""
    output: str
    """Which one that is."""
    sizes: tuple[tuple[int, int, int], ...]
    """Of the batches that it was run with: images, height, width."""


def verify(run: Run, model: Run, batches: Sequence[Tensor], where: str, names: Sequence[str] = ()) -> Verification:
    """Compare a float32 file with its model.

    Args:
        run: The file, by its runtime.
        model: The model, in eval mode.
        batches: Images `(B, C, height, width)` each.
        where: The file, for messages.
        names: Of the outputs; numbers by default.

    Raises:
        ExportError: If an image's output is wrong: it differs, and is none that the model itself gives for that image
            moved by less than rounding.
        DataError: If the model gives NaN for an image.
    """
    compared = _compared(run, model, batches, where, names)
    turned, number = 0, 0
    for images, found, excess in zip(compared.batches, compared.found, compared.excess, strict=True):
        for index in (~(excess <= 1)).any(1).nonzero()[:, 0].tolist():
            if not _is_given_nearby(model, images[index], [value[index] for value in found], compared.scales):
                worst = int(excess[index].argmax())
                raise ExportError(
                    f"{where} is wrong: the output{compared.called(worst)} of image {number + index}, in a batch of "
                    f"{batch_text(images)}, differs from the model's by {excess[index, worst]:.3g} times the "
                    f"tolerance of {TOLERANCE:g}, and is none that the model gives when the image is moved by less "
                    "than rounding. The file was removed. Try another version of the format's library, or another "
                    "format"
                )
            turned += 1
        number += len(images)
    return _summary(compared, turned)


def verify_half(
    run: Run, model: Run, half: Run, batches: Sequence[Tensor], where: str, names: Sequence[str] = ()
) -> Verification:
    """The same for a file in float16, in which many choices turn: the error of each output may be that of the model in
    float16, at its largest for images that are moved by as much as float16 rounds.

    Args:
        run: The file, by its runtime.
        model: The model in float32.
        half: The model in float16, with input and outputs in float32.
        batches: Images `(B, C, height, width)` each, float32.
        where: The file, for messages.
        names: Of the outputs; numbers by default.

    Raises:
        ExportError: If the file's error is more than twice that of the model in float16, or values overflow in either.
        DataError: If the model gives NaN for an image.
    """
    compared = _compared(run, model, batches, where, names)
    itself = "the model itself in float16"
    own = [Comparison(each, model, batches, itself, names).errors() for each in _rounding(half)]
    for output, error in enumerate(compared.errors()):
        # Of a mask, a choice that turns may move an infinity; that measures nothing.
        finite = [errors[output] for errors in own if math.isfinite(errors[output])]
        if not finite:
            raise ExportError(
                f"{where} can't be verified: in float16 the outputs{compared.called(output)} of the model itself hold "
                "infinities or NaN, so there is nothing to measure the file by. The file was removed. Leave half out"
            )
        bound = max(finite)
        if not error <= HALF_BOUND * bound + TOLERANCE:
            raise ExportError(
                f"{where} is wrong: its outputs{compared.called(output)} differ from the model's by {error:.3g} of the "
                f"spread between images, those of {itself} by {bound:.3g}. The file was removed. Leave half out"
            )
    return _summary(compared)


def verify_int8(run: Run, model: Run, batches: Sequence[Tensor], where: str, names: Sequence[str] = ()) -> Verification:
    """The same for a quantised file: its error is reported, and refused where an output says nothing of an image.

    Args:
        run: The file, by its runtime.
        model: The model in float32.
        batches: Images `(B, C, height, width)` each, two at least in all.
        where: The file, for messages.
        names: Of the outputs; numbers by default.

    Raises:
        ExportError: If an output of the file is no nearer to the model's than one answer for all images.
        DataError: If the model gives NaN for an image.
    """
    compared = _compared(run, model, batches, where, names)
    for output, error in enumerate(compared.errors()):
        if not error < 1:
            raise ExportError(
                f"{where} is wrong: its outputs{compared.called(output)} differ from the model's by {error:.3g} of the "
                "spread between images, no less than the same answer for all. The file was removed. Quantise by more "
                "images, or leave int8 out"
            )
    return _summary(compared)


def batches_of(images: Tensor, batch_size: int | None, other_size: tuple[int, int] | None) -> list[Tensor]:
    """Images in the batches that a file is verified with.

    Args:
        images: `(M, C, height, width)`.
        batch_size: Of all batches. None: several sizes, one of them 1.
        other_size: `(height, width)` of one batch more, the first one resized; None for none.
    """
    if batch_size is None:
        batches = [images[:1], *images[1:].split(BATCH)]
    else:
        # Whole batches; images over the last one are left out, unless there are none before.
        batches = [batch for batch in images.split(batch_size) if len(batch) == batch_size]
    if other_size is not None:
        batches.append(
            F.interpolate(batches[-1][:2] if batch_size is None else batches[0], other_size, mode="bilinear")
        )
    return batches


def _compared(run: Run, model: Run, batches: Sequence[Tensor], where: str, names: Sequence[str]) -> Comparison:
    compared = Comparison(run, model, batches, where, names)
    compared.refuse_what_is_not_finite(where)
    return compared


def _rounding(half: Run) -> Iterator[Run]:
    """A model in float16; and on images that are moved by as much as float16 rounds."""
    yield half
    generator = torch.Generator().manual_seed(0)

    def noisy(images: Tensor) -> tuple[Tensor, ...]:
        noise = torch.randn(images.shape, generator=generator)
        return half(images + noise * (HALF_NOISE * images.std((1, 2, 3), keepdim=True)))

    for _ in range(HALF_DRAWS):
        yield noisy


def _is_given_nearby(model: Run, image: Tensor, found: Sequence[Tensor], scales: Sequence[Tensor]) -> bool:
    """Whether the model gives the outputs, `(V)` each, for an image `(C, height, width)` that is moved by less than
    rounding."""
    generator = torch.Generator().manual_seed(0)
    for noise in NOISE:
        draws = torch.randn(DRAWS, *image.shape, generator=generator) * (noise * image.std())
        for moved in (image + draws).split(BATCH):
            given = values_of(model(moved))
            same = [value.expand_as(other) for value, other in zip(found, given, strict=True)]
            if (excess_of(same, given, scales) <= 1).all(1).any():
                return True
    return False


def _summary(compared: Comparison, turned: int = 0) -> Verification:
    excess = torch.cat(compared.excess)
    errors = compared.errors()
    worst = max(range(len(errors)), key=errors.__getitem__)
    return Verification(
        images=len(excess),
        equal=int((excess <= 1).all(1).sum()),
        turned=turned,
        difference=excess.max().item(),
        error=errors[worst],
        output=compared.names[worst],
        sizes=tuple((len(images), images.shape[2], images.shape[3]) for images in compared.batches),
    )
