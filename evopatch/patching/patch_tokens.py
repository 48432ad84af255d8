"""What a model says of its tokens: how large its patches are, how many it has places for, what comes to a block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..rewrite.tracing import parameters_of
from .handle import shared_copy

_MOST_PREFIX = 9
_TOKEN = re.compile("cls|class_|token|regist|dist")
"""In names of parameters that are prefix tokens."""


def patch_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels, by the model's first convolution; None where that isn't one over patches. Without any
    convolution by what is called `patch_size`."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            whole = module.kernel_size == module.stride and module.padding in ((0, 0), "valid") and module.groups == 1
            return (module.kernel_size[0], module.kernel_size[1]) if whole else None
    for module in model.modules():
        size = module.__dict__.get("patch_size")
        pair = (size, size) if isinstance(size, int) else size
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(side, int) for side in pair):
            return pair[0], pair[1]
    return None


def check_prefix(model: nn.Module, channels: int, prefix: int) -> None:
    """
    Args:
        model: The whole model.
        channels: `C`.
        prefix: `P`, as somebody says.

    Raises:
        ConfigError: If the model's position embedding has places for another number of prefix tokens.
    """
    for name, tokens in position_embeddings(model, channels):
        # Some have places for the patches alone.
        if _is_square(tokens) or _is_square(tokens - prefix):
            return
        if (likely := prefix_tokens_of(tokens)) is not None:
            side = math.isqrt(tokens - likely)
            raise ConfigError(
                f"prefix_tokens={prefix}, and {name} has places for {tokens} tokens: there seem to be {likely} prefix "
                f"tokens and a grid of {side}x{side} patches"
            )


def position_embeddings(model: nn.Module, channels: int) -> Iterable[tuple[str, int]]:
    """Name and number of places of those parameters that look like position embeddings."""
    for name, parameter in model.named_parameters():
        *batch, tokens, last = (1, 1, *parameter.shape)
        if "pos" in name and last == channels and set(batch) == {1} and tokens > 3:
            yield name, tokens


def prefix_tokens_of(places: int) -> int | None:
    """How many of the places are for prefix tokens, if the others are a square of patches; None where none are."""
    return next((count for count in range(min(_MOST_PREFIX, places)) if _is_square(places - count)), None)


def likely_prefix(model: nn.Module, channels: int) -> int | None:
    """How many prefix tokens a model's parameters speak of; None where they say nothing certain."""
    places = [tokens for _, tokens in position_embeddings(model, channels)]
    if places and not _is_square(places[0]):
        return prefix_tokens_of(places[0])
    tokens = [name for name, p in model.named_parameters() if p.shape[-1:] == (channels,) and _TOKEN.search(name)]
    return 0 if places and not tokens else None


def sample_image(model: nn.Module, channels: int) -> Tensor | None:
    """One black image of a model's own size, by its position embedding; None where that or its patches aren't known."""
    size, places = patch_size_of(model), [tokens for _, tokens in position_embeddings(model, channels)]
    like = next(model.parameters(), None)
    if size is None or not places or not _is_square(places[0]) or like is None or like.is_meta:
        return None
    side = math.isqrt(places[0])
    return like.new_zeros(1, 3, side * size[0], side * size[1])


def prefix_seen(model: nn.Module, block: str, channels: int) -> int | None:
    """How many prefix tokens come to a block of an image of the model's own size; None where that can't be tried."""
    image, size = sample_image(model, channels), patch_size_of(model)
    if image is None or size is None:
        return None
    try:
        x, _ = block_inputs(model, block, image)
    except UnsupportedModelError:
        return None
    prefix = x.shape[0] * x.shape[1] - image.shape[2] // size[0] * (image.shape[3] // size[1])
    return prefix if prefix >= 0 else None


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


@torch.no_grad()
def block_inputs(model: nn.Module, block: str, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What a block is given when the model runs on one image.

    Args:
        model: Left as it is; a copy on the same weights runs.
        block: Its path.
        images: `(B, 3, height, width)`.

    Returns:
        Its tokens, and its other inputs by name.

    Raises:
        UnsupportedModelError: If the model doesn't run on images, or not through the block.
    """
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    copy = shared_copy(model).eval()
    for module in copy.modules():  # nobody's hooks are for this
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    called: Any = copy.get_submodule(block)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(parameters_of(module), args, strict=False)) | kwargs
        first, *others = named
        seen.append((named[first], {name: named[name] for name in others}))

    called.register_forward_pre_hook(look, with_kwargs=True)
    try:
        copy(images[:1])
    except Exception as error:  # whatever somebody's model raises
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be run on images {tuple(images[:1].shape)}: {type(error).__name__}: {error}"
        ) from error
    if not seen:
        raise UnsupportedModelError(f"{block} isn't called when {type(model).__name__} runs on images")
    return seen[0]


def check_tokens_seen(tokens: int, prefix: int, patch_size: tuple[int, int] | None, images: Tensor) -> None:
    """
    Args:
        tokens: `T`, as a block was given them.
        prefix: `P`, as somebody says.
        patch_size: Height and width in pixels, where known.
        images: That were given to the model.

    Raises:
        ConfigError: If there are more or fewer prefix tokens.
    """
    if patch_size is None:
        return
    rows, columns = images.shape[-2] // patch_size[0], images.shape[-1] // patch_size[1]
    if tokens != prefix + rows * columns:
        raise ConfigError(
            f"prefix_tokens={prefix}, and {tokens} tokens come to the blocks of an image with {rows}x{columns} "
            f"patches: there seem to be {tokens - rows * columns} prefix tokens"
        )
