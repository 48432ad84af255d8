"""What a converter gets: a model as converters like it, and the sizes that it is converted for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

INPUT = "images"
"""What the input of a file is called, where the format has names."""


class ImageModel(nn.Module):
    """A model with images in and tensors out, in a fixed order, and no other arguments.

    Args:
        model: Of any library; it returns a tensor, or tensors in mappings and sequences.
        any_size: Have transformers' position embeddings resized to the image.
    """

    def __init__(self, model: nn.Module, any_size: bool = False) -> None:
        super().__init__()
        self.model = model
        resizes = any_size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if resizes else {}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """`(B, C, height, width)` to the tensors that the model returns."""
        return tuple(tensor for _, tensor in self._tensors(images))

    def output_names(self, images: Tensor) -> list[str]:
        """What those are called: a mapping's keys, `output` for one that has no name, numbers in a sequence.

        Raises:
            UnsupportedModelError: If one hasn't one entry per image.
        """
        named = self._tensors(images)
        if not named:
            raise UnsupportedModelError("the model returns no tensors: expected one or more, with one entry per image")
        for name, value in named:
            if not value.dim() or len(value) != len(images):
                raise UnsupportedModelError(
                    f"the model's output '{name}' has the shape {tuple(value.shape)} for {len(images)} images: "
                    "expected one entry per image. Give the part of the model that returns such"
                )
        return [name for name, _ in named]

    def _tensors(self, images: Tensor) -> list[tuple[str, Tensor]]:
        return list(_named(self.model(images, **self._options), ""))


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from _named(part, f"{name or 'output'}.{number}")
    elif value is not None:
        raise UnsupportedModelError(
            f"the model returns a {type(value).__name__}{f' as {name}' if name else ''}: expected tensors, or mappings "
            "and sequences of them. Give the part of the model that returns these"
        )


@dataclass(frozen=True)
class Conversion:
    """One conversion, of a model in eval mode on the CPU."""

    model: ImageModel
    example: Tensor
    """Images `(B, C, height, width)`, in the model's type; its sizes are the file's where they are fixed."""
    output_names: list[str]
    any_batch: bool
    any_size: bool
    half: bool
    int8: bool
    calibration: Tensor | None
    """Images `(M, C, height, width)` to quantise by; None where the format's library takes none."""

    def program(self) -> torch.export.ExportedProgram:
        """The model as torch exports it."""
        return torch.export.export(self.model, (self.example,), dynamic_shapes=(self.free_axes(),))

    def calibration_batches(self) -> list[Tensor]:
        """`(B, C, height, width)` each, of images to quantise by: one where the file takes any batch, whole batches
        otherwise, the last one filled up from the beginning."""
        images = self.calibration
        assert images is not None
        batch_size = 1 if self.any_batch else len(self.example)
        whole = -(-len(images) // batch_size) * batch_size
        return list(images[torch.arange(whole) % len(images)].split(batch_size))

    def sizes(self) -> list[int]:
        """Of the file's input, axis by axis; -1 for any length."""
        free = self.free_axes() or {}
        return [-1 if axis in free else length for axis, length in enumerate(self.example.shape)]

    def free_axes(self) -> dict[int, Any] | None:
        """The input's axes of any length, as `torch.export` takes them."""
        axes: tuple[int, ...] = ((0,) if self.any_batch else ()) + ((2, 3) if self.any_size else ())
        return dict.fromkeys(axes, torch.export.Dim.DYNAMIC) or None
