"""What a file and its model give for the same images, output by output, and how far apart that is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError, ExportError
from .form import Run

TOLERANCE = 1e-4
"""Of an equal value: relative to itself, and to the root mean square of its output over all images."""


class Comparison:
    """Two runs, over all batches. Outputs are kept apart, or large ones would hide what is wrong with small ones.

    Args:
        run: The file, by its runtime.
        model: The model, in eval mode and float32.
        batches: Images `(B, C, height, width)` each.
        where: The file, for messages.
        names: Of the outputs; numbers by default.

    Raises:
        ExportError: If the file stops, or returns other shapes.
    """

    def __init__(self, run: Run, model: Run, batches: Sequence[Tensor], where: str, names: Sequence[str] = ()) -> None:
        self.batches = batches
        self.expected: list[list[Tensor]] = []
        """By batch and output: `(B, V)`, all values of each image."""
        self.found: list[list[Tensor]] = []
        self.names: Sequence[str] = ()
        for images in batches:
            outputs = model(images)
            self.names = names or [str(output) for output in range(len(outputs))]
            found = _run(run, images, outputs, where)
            self.expected.append(values_of(outputs))
            self.found.append(values_of(found))
        self.scales = [
            _finite_rms(torch.cat([v.flatten() for v in values])) for values in zip(*self.expected, strict=True)
        ]
        """By output, over all images."""
        self.excess = [
            excess_of(found, expected, self.scales) for found, expected in zip(self.found, self.expected, strict=True)
        ]
        """By batch: `(B, outputs)`, see `excess_of`."""

    def called(self, output: int) -> str:
        """The output's name for a message, where there are several."""
        return f" '{self.names[output]}'" if len(self.names) > 1 else ""

    def errors(self) -> list[float]:
        """By output: root mean square of the differences, relative to the spread between images, or to the output
        itself where there is none."""
        return [
            _error(list(zip(found, expected, strict=True)))
            for found, expected in zip(zip(*self.found, strict=True), zip(*self.expected, strict=True), strict=True)
        ]

    def refuse_what_is_not_finite(self, where: str) -> None:
        """
        Args:
            where: The file, for messages.

        Raises:
            ExportError: If it gives infinities or NaN where the model doesn't.
            DataError: If the model gives NaN.
        """
        first = 0
        for images, expected, found in zip(self.batches, self.expected, self.found, strict=True):
            for output, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
                if (nan := theirs.isnan().any(1)).any():
                    raise DataError(
                        f"the model's output{self.called(output)} holds NaN for image {first + int(nan.nonzero()[0])}: "
                        "nothing can be compared with that. Look at that image and at the model's weights"
                    )
                if (lost := (theirs.isfinite() & ~ours.isfinite()).any(1)).any():
                    raise ExportError(
                        f"{where} is wrong: the output{self.called(output)} of image {first + int(lost.nonzero()[0])}, "
                        f"in a batch of {batch_text(images)}, holds infinities or NaN where the model's in float32 is "
                        "finite. The file was removed. Leave half or int8 out if one was asked for, or try another "
                        "format"
                    )
            first += len(images)


def excess_of(found: Sequence[Tensor], expected: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """`(B, outputs)`: the largest difference of each output `(B, V)` in units of the tolerance, 0 of equal infinities.

    Args:
        found: Outputs `(B, V)` of the file.
        expected: Those of the model.
        scales: One number per output, see `Comparison.scales`.
    """
    excesses = []
    for ours, theirs, scale in zip(found, expected, scales, strict=True):
        excess = (ours - theirs).abs() / (TOLERANCE * (scale + theirs.abs()))
        excess = excess.nan_to_num(torch.inf, posinf=torch.inf).masked_fill(ours == theirs, 0)
        excesses.append(F.pad(excess, (0, 1)).amax(1))  # an output may have no values
    return torch.stack(excesses, 1)


def values_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """`(B, V)` each: all values of each image, in float32."""
    return [value.float()[:, None].flatten(1) for value in outputs]


def batch_text(images: Tensor) -> str:
    """A batch's size in words."""
    return f"{len(images)} image{'s' * (len(images) > 1)} of {images.shape[2]} by {images.shape[3]} px"


def _run(run: Run, images: Tensor, expected: tuple[Tensor, ...], where: str) -> tuple[Tensor, ...]:
    try:
        found = run(images)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise ExportError(
            f"{where} doesn't run on a batch of {batch_text(images)}: {type(error).__name__}: {text}. The file was "
            "removed"
        ) from error
    shapes = [tuple(value.shape) for value in found], [tuple(value.shape) for value in expected]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"{where} is wrong: for a batch of {batch_text(images)} it returns {shapes[0]}, the model {shapes[1]}. The "
            "file was removed"
        )
    return found


def _error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Of what was found and expected of one output, `(B, V)` by batch."""
    squares, spread, power = 0.0, 0.0, 0.0
    for size in {expected.shape[1] for _, expected in pairs}:
        same = [pair for pair in pairs if pair[1].shape[1] == size]
        found, expected = (torch.cat(values) for values in zip(*same, strict=True))
        if not size:
            continue
        squares += (found - expected).masked_fill(found == expected, 0).square().mean().item()
        # Infinities that both have, such as those of a mask, say nothing of how large differences are.
        finite = expected.masked_fill(~expected.isfinite(), 0)
        spread += (finite - finite.mean(0)).square().mean().item()
        power += finite.square().mean().item()
    whole = spread if spread > TOLERANCE**2 * power else power
    return (squares / whole) ** 0.5 if whole else (0.0 if not squares else torch.inf)


def _finite_rms(values: Tensor) -> Tensor:
    finite = values[values.isfinite()]
    return finite.square().mean().sqrt() if len(finite) else torch.ones(())
