"""What a model's modules and parameters say of its tokens: how large its patches and images may be, and how many tokens
come before those of the patches. Nothing of it is certain; see `trying.py` for what is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn

_MOST_PREFIX = 9
_TOKEN = re.compile("cls|class_|token|regist|dist")
"""In names of parameters that are prefix tokens."""
_SIZES = ("img_size", "image_size", "input_size")
_USUAL_PATCHES = (16, 14, 8, 32)
_USUAL_SIDE, _MOST_SIDE = 224, 2048
_MOST_OBLONG = 4
_MOST_SIZES = 64


def patch_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Height and width in pixels that a patch may have, likeliest first: by the model's first convolution, alone and
    with those after it, as long as they are ones over patches; empty where the first isn't. Without any convolution by
    what is called `patch_size`."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    found: list[tuple[int, int]] = []
    height = width = 1
    for module in convolutions:
        if module.kernel_size != module.stride or module.padding not in ((0, 0), "valid") or module.groups != 1:
            break
        height, width = height * module.kernel_size[0], width * module.kernel_size[1]
        found.append((height, width))
    said = [] if convolutions else _pairs(model, ("patch_size",))
    return found or said[:1]


def first_convolution(model: nn.Module) -> nn.Conv2d | None:
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def patch_size_of(model: nn.Module) -> tuple[int, int] | None:
    """The likeliest of `patch_sizes`; None where there is none."""
    return next(iter(patch_sizes(model)), None)


def _pairs(model: nn.Module, names: Iterable[str]) -> list[tuple[int, int]]:
    """Numbers, or pairs of them, that modules keep by one of these names."""
    values = [module.__dict__.get(name) for module in model.modules() for name in names]
    pairs: list[Any] = [(value, value) if isinstance(value, int) else value for value in values]
    pairs = [pair for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2]
    return [(pair[0], pair[1]) for pair in pairs if all(isinstance(side, int) and side > 0 for side in pair)]


def position_embeddings(model: nn.Module, channels: int) -> Iterable[tuple[str, int]]:
    """Name and number of places of what looks like a position embedding: of parameters, buffers and other tensors."""
    for path, module in model.named_modules():
        for name, value in (module._parameters | module._buffers | module.__dict__).items():
            *batch, tokens, last = (1, 1, *value.shape) if isinstance(value, Tensor) else (0, 0)
            if "pos" in f"{path}.{name}" and last == channels and set(batch) == {1} and tokens > 3:
                yield f"{path}.{name}", tokens


def likely_prefix(model: nn.Module, channels: int) -> int | None:
    """How many prefix tokens a model's parameters speak of: as many as leave a square of the position embedding's
    places, where as many are parameters themselves; None where they don't agree.

    Args:
        model: The whole model.
        channels: `C`.
    """
    places = next((tokens for _, tokens in position_embeddings(model, channels)), None)
    tokens = [p for name, p in model.named_parameters() if p.shape[-1:] == (channels,) and _TOKEN.search(name)]
    if places is None or (tokens and _is_square(places)):  # a square may leave out the prefix tokens, or not
        return None
    counted = sum(parameter.numel() // channels for parameter in tokens)
    return counted if counted < min(_MOST_PREFIX, places) and _is_square(places - counted) else None


def likely_sizes(model: nn.Module, channels: int) -> Iterable[tuple[int, int]]:
    """Height and width in pixels of images that a model may take, likeliest first; a few dozens at most.

    Args:
        model: The whole model.
        channels: `C`.
    """
    fitting = ((h, w) for h, w in _sizes(model, channels) if max(h, w) <= _MOST_SIDE)
    return islice(dict.fromkeys(fitting), _MOST_SIZES)


def _sizes(model: nn.Module, channels: int) -> Iterator[tuple[int, int]]:
    yield from _pairs(model, _SIZES)
    patches = [*patch_sizes(model), *((side, side) for side in _USUAL_PATCHES)]
    for _, places in position_embeddings(model, channels):
        for rows, columns in _grids(places):
            yield from ((rows * height, columns * width) for height, width in patches)
    yield _USUAL_SIDE, _USUAL_SIDE


def _grids(places: int) -> list[tuple[int, int]]:
    """Rows and columns that leave some of the places to prefix tokens: squares, then others, the nearest to a square
    first."""
    grids = []
    for count in (places - prefix for prefix in range(min(_MOST_PREFIX, places))):
        for rows in range(1, math.isqrt(count) + 1):
            if count % rows == 0 and count // rows <= _MOST_OBLONG * rows:
                grids += [(rows, count // rows), (count // rows, rows)]
    # The sort is stable: fewer prefix tokens come first.
    return sorted(grids, key=lambda grid: grid[0] != grid[1])


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
