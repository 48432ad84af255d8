"""Whether a file gives what the model gives, image by image, and what may explain a difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ExportError
from .form import Run

TOLERANCE = 1e-4
"""Of an equal image: relative to each value, and to the root mean square of the output or 1, whichever is more."""
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
    """How many images have the same output, to a tolerance of 1e-4."""
    turned: int
    """How many don't, and have one that the model itself gives when the image is moved by less than rounding: two
    tokens were so nearly equal that the choice between them turned."""
    difference: float
    """The largest, in units of the tolerance; of the equal images it is at most 1."""
    error: float
    """Root mean square of the differences, relative to how much outputs differ between images: 1 is no better than the
    same answer for all."""
    sizes: tuple[tuple[int, int, int], ...]
    """Of the batches that it was run with: images, height, width."""


def verify(run: Run, model: Run, batches: Sequence[Tensor], where: str) -> Verification:
    """Compare a float32 file with its model.

    Args:
        run: The file, by its runtime.
        model: The model, in eval mode.
        batches: Images `(B, C, height, width)` each.
        where: The file, for messages.

    Raises:
        ExportError: If an image's output is wrong: it differs, and is none that the model itself gives for that image
            moved by less than rounding.
    """
    comparisons = list(_compare(run, model, batches, where))
    turned, number = 0, 0
    for images, expected, found in comparisons:
        excess = _excess(found, expected)
        for index in (excess > 1).nonzero()[:, 0].tolist():
            if not _is_given_nearby(model, images[index], found[index]):
                raise ExportError(
                    f"{where} is wrong: the output of image {number + index}, in a batch of {_text(images)}, differs "
                    f"from the model's by {excess[index]:.3g} times the tolerance of {TOLERANCE:g}, and is none that "
                    "the model gives when the image is moved by less than rounding. The file was removed. Try another "
                    "version of the format's library, or another format"
                )
            turned += 1
        number += len(images)
    return _summary(comparisons, turned)


def verify_half(run: Run, model: Run, half: Run, batches: Sequence[Tensor], where: str) -> Verification:
    """The same for a file in float16, in which many choices turn: its error may be that of the model in float16, at its
    largest for images that are moved by as much as float16 rounds.

    Args:
        run: The file, by its runtime.
        model: The model in float32.
        half: The model in float16, with input and outputs in float32.
        batches: Images `(B, C, height, width)` each, float32.
        where: The file, for messages.

    Raises:
        ExportError: If the file's error is more than twice that of the model in float16.
    """
    result = _summary(list(_compare(run, model, batches, where)))
    own = max(_summary(list(_compare(each, model, batches, "the model in float16"))).error for each in _rounding(half))
    if result.error > HALF_BOUND * own + TOLERANCE:
        raise ExportError(
            f"{where} is wrong: its outputs differ from the model's by {result.error:.3g} of the spread between "
            f"images, those of the model itself in float16 by {own:.3g}. The file was removed. Leave half out"
        )
    return result


def verify_int8(run: Run, model: Run, batches: Sequence[Tensor], where: str) -> Verification:
    """The same for a quantised file: its error is reported, and refused where the file says nothing of an image.

    Args:
        run: The file, by its runtime.
        model: The model in float32.
        batches: Images `(B, C, height, width)` each, two at least in all.
        where: The file, for messages.

    Raises:
        ExportError: If the file is no nearer to the model than one answer for all images.
    """
    result = _summary(list(_compare(run, model, batches, where)))
    if result.error >= 1:
        raise ExportError(
            f"{where} is wrong: its outputs differ from the model's by {result.error:.3g} of the spread between "
            "images, no less than the same answer for all. The file was removed. Quantise by more images, or leave "
            "int8 out"
        )
    return result


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


def _rounding(half: Run) -> Iterator[Run]:
    """A model in float16; and on images that are moved by as much as float16 rounds."""
    yield half
    generator = torch.Generator().manual_seed(0)

    def noisy(images: Tensor) -> tuple[Tensor, ...]:
        noise = torch.randn(images.shape, generator=generator)
        return half(images + noise * (HALF_NOISE * images.std((1, 2, 3), keepdim=True)))

    for _ in range(HALF_DRAWS):
        yield noisy


def _compare(run: Run, model: Run, batches: Sequence[Tensor], where: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, and for each of them all values of the model and of the file."""
    for images in batches:
        expected = model(images)
        try:
            found = run(images)
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            raise ExportError(
                f"{where} doesn't run on a batch of {_text(images)}: {type(error).__name__}: {text}. The file "
                "was removed"
            ) from error
        shapes = [tuple(value.shape) for value in found], [tuple(value.shape) for value in expected]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"{where} is wrong: for a batch of {_text(images)} it returns {shapes[0]}, the model {shapes[1]}. The "
                "file was removed"
            )
        yield images, _values(expected, len(images)), _values(found, len(images))


def _values(outputs: tuple[Tensor, ...], batch: int) -> Tensor:
    """`(B, V)`: all values of each image."""
    for value in outputs:
        if not value.dim() or len(value) != batch:
            raise ExportError(
                f"an output has the shape {tuple(value.shape)} for {batch} images: expected one entry per image. Give "
                "a model that returns such"
            )
    return torch.cat([value.float().flatten(1) for value in outputs], dim=1)


def _excess(found: Tensor, expected: Tensor) -> Tensor:
    """`(B)`: the largest difference of each image in units of the tolerance; infinite where a value isn't finite."""
    scale = expected.square().mean(1, keepdim=True).sqrt().clamp(min=1)
    excess = (found - expected).abs() / (TOLERANCE * (scale + expected.abs()))
    return excess.nan_to_num(torch.inf, posinf=torch.inf).amax(1)


def _is_given_nearby(model: Run, image: Tensor, found: Tensor) -> bool:
    """Whether the model gives an output for an image `(C, height, width)` that is moved by less than rounding."""
    generator = torch.Generator().manual_seed(0)
    for noise in NOISE:
        draws = torch.randn(DRAWS, *image.shape, generator=generator) * (noise * image.std())
        for moved in (image + draws).split(BATCH):
            given = _values(model(moved), len(moved))
            if (_excess(found.expand_as(given), given) <= 1).any():
                return True
    return False


def _summary(comparisons: list[tuple[Tensor, Tensor, Tensor]], turned: int = 0) -> Verification:
    excess = torch.cat([_excess(found, expected) for _, expected, found in comparisons])
    squares, spread = 0.0, 0.0
    for size in {tuple(expected.shape[1:]) for _, expected, _ in comparisons}:
        same = [(expected, found) for _, expected, found in comparisons if tuple(expected.shape[1:]) == size]
        expected, found = (torch.cat(values) for values in zip(*same, strict=True))
        squares += (found - expected).square().mean().item()
        spread += (expected - expected.mean(0)).square().mean().item()
    return Verification(
        images=len(excess),
        equal=int((excess <= 1).sum()),
        turned=turned,
        difference=excess.max().item(),
        error=(squares / spread) ** 0.5 if spread else (0.0 if not squares else torch.inf),
        sizes=tuple((len(images), images.shape[2], images.shape[3]) for images, _, _ in comparisons),
    )


def _text(images: Tensor) -> str:
    return f"{len(images)} image{'s' * (len(images) > 1)} of {images.shape[2]} by {images.shape[3]} px"
