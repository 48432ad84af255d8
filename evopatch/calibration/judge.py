"""How far a patched model's outputs are from the unpatched one's, image by image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..measure.fingerprint import fingerprint
from ..measure.kinds import Kind, divergence, spread
from ..measure.outputs import Outputs, compared
from ..patching.given_images import run_on


class Errors(NamedTuple):
    """Of some images."""

    error: Tensor
    """`(B,)` float64: KL(unpatched || patched) in nats of classes, and summed over labels; of numbers the squared
    difference relative to the variance of the unpatched ones between the images; one minus the cosine of features."""
    agrees: Tensor | None
    """`(B,)` bool: the predicted class is the same; None of other outputs than classes."""


class Judge:
    """Compares on fixed images.

    Args:
        unpatched: The model without the patch.
        batches: Images `(B, 3, height, width)`, on its device and in its type.
        prefix: How many tokens are no patch tokens, where it returns tokens.
        behind: How many of these are the last ones; the others are the first.

    Raises:
        DataError: If the unpatched model doesn't run on the images.
    """

    def __init__(self, unpatched: nn.Module, batches: Sequence[Tensor], prefix: int, behind: int = 0) -> None:
        self.batches = batches
        self._prefix, self._behind = prefix, behind
        with torch.no_grad():
            self._outputs = [compared(run_on(unpatched, batch), unpatched) for batch in batches]
        numbers = self.kind == "numbers"
        self._unit = spread(torch.cat([whole.values[0] for whole in self._outputs])) if numbers else torch.ones(())

    @property
    def kind(self) -> Kind:
        """Of the outputs that are compared."""
        return self._outputs[0].kind

    @property
    def fingerprint(self) -> str:
        """Differs where the unpatched outputs or their kind do, as of models with the same weights that compute with
        them otherwise."""
        every = enumerate(self._outputs)
        return fingerprint({f"{self.kind} {i} {j}": own for i, whole in every for j, own in enumerate(whole.values)})

    @property
    def compares_patches(self) -> bool:
        """Whether features of patches are compared, not of whole images alone."""
        return any(values.dim() > 2 for values in self._outputs[0].values)

    @torch.no_grad()
    def errors(self, model: nn.Module) -> Iterator[Errors]:
        """Batch by batch.

        Raises:
            DataError: If an output isn't finite.
        """
        for batch, whole in zip(self.batches, self._outputs, strict=True):
            found = self._errors(compared(model(batch), model), whole)
            if not found.error.isfinite().all():
                raise DataError("what the model makes of the images isn't finite: expected finite outputs")
            yield found

    def all_errors(self, model: nn.Module) -> Errors:
        """Of all images."""
        found = list(self.errors(model))
        agrees = [batch.agrees for batch in found if batch.agrees is not None]
        return Errors(torch.cat([batch.error for batch in found]), torch.cat(agrees) if agrees else None)

    def _errors(self, own: Outputs, whole: Outputs) -> Errors:
        if self.kind != "features":
            found, expected = (outputs.values[0] / self._unit for outputs in (own, whole))
            agrees = (found.argmax(1) == expected.argmax(1)).cpu() if self.kind == "classes" else None
            return Errors(divergence(self.kind, found, expected).double().clamp_min(0.0).cpu(), agrees)
        distances = []
        for features, expected in zip(own.values, whole.values, strict=True):
            if features.dim() == 4:  # (B, C, h, w)
                features, expected = (values.flatten(2).transpose(1, 2) for values in (features, expected))
            distance = 1.0 - F.cosine_similarity(features, expected, dim=-1)
            if distance.dim() == 1:
                distances.append(distance)
            else:  # class and patch features count alike
                split = self._prefix if features is own.values[0] and self._prefix < distance.shape[1] else 0
                distance = distance.roll(self._behind, 1) if split else distance
                distances += [part.mean(1) for part in (distance[:, :split], distance[:, split:]) if part.shape[1]]
        return Errors(torch.stack(distances).mean(0).double().clamp_min(0.0).cpu(), None)
