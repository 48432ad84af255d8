"""Which tokens come to a model's blocks of an image, found out by running it until it reaches them.

Tokens that are the same for two images can't be of patches: they are prefix tokens, such as class tokens and registers.
The other way round it isn't certain, as a model may make a prefix token of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..rewrite.tracing import parameters_of
from .handle import shared_copy
from .patch_tokens import first_convolution, likely_sizes

_SEEDS = 518309, 604171
"""Not those by which anybody makes the images that are given."""


@dataclass(frozen=True)
class Tried:
    """What came to a block."""

    block: str
    """Its path."""
    size: tuple[int, int]
    """Height and width of the image."""
    tokens: Tensor
    """As the block was given them."""
    others: Tensor | None
    """The same of another image; None where the model doesn't run on that."""
    inputs: dict[str, Any]
    """What else the block was given, by name."""
    to_host: bool
    """Whether the host itself was given the image."""

    def count(self, tokens_first: bool) -> int:
        """`T`."""
        return int(self.tokens.shape[0 if tokens_first else 1])

    def constant(self, tokens_first: bool) -> list[int] | None:
        """Places of the tokens that are the same for both images; None where that tells nothing."""
        a, b = self.tokens, self.others
        if b is None or a.dim() != 3 or a.shape != b.shape or not a.is_floating_point():
            return None
        rounding = 4 * torch.finfo(a.dtype).eps * a.abs().max()
        same = ((a - b).abs() <= rounding).all(2).all(1 if tokens_first else 0)
        # Of weights that are zeros everything is the same.
        return None if bool(same.all()) else torch.nonzero(same).flatten().tolist()

    def leading(self, tokens_first: bool) -> int:
        """How many of these stand before all other tokens."""
        places = self.constant(tokens_first) or []
        return next((place for place, found in enumerate(places) if found != place), len(places))

    def behind(self, tokens_first: bool) -> list[int]:
        """Places of those that stand after others."""
        return (self.constant(tokens_first) or [])[self.leading(tokens_first) :]

    def grid(self, patch: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of so many pixels."""
        return self.size[0] // patch[0], self.size[1] // patch[1]

    def patch_size(self, tokens: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """The first of these sizes of a patch of which the image has so many; None where none is."""
        grids = {size: self.grid(size) for size in sizes}
        return next((size for size, (rows, columns) in grids.items() if rows * columns == tokens), None)

    def check(self, tokens_first: bool, prefix: int, sizes: Sequence[tuple[int, int]]) -> None:
        """
        Args:
            tokens_first: The block takes `(T, B, C)`.
            prefix: `P`, as somebody says.
            sizes: That a patch may have, in pixels.

        Raises:
            UnsupportedModelError: If prefix tokens stand behind patch tokens.
            ConfigError: If there are more or fewer of them.
        """
        if self.constant(tokens_first) is None:
            return
        count, leading = self.count(tokens_first), self.leading(tokens_first)
        if behind := self.behind(tokens_first):
            raise UnsupportedModelError(
                f"of the {count} tokens that come to {self.block}, counted from 0, {_listed(behind)} "
                "are the same for any image, such as a class token or registers, and come after patch tokens: expected "
                "all such tokens first. Put them there in the model's forward (with their places in a position "
                "embedding, and where the head reads them), or leave the model unpatched"
            )
        found = f"prefix_tokens={prefix}, and of the {count} tokens that come to {self.block} the first {leading}"
        if prefix < leading:
            raise ConfigError(f"{found} are the same for any image: there seem to be {leading} prefix tokens")
        size = self.patch_size(count - leading, sizes)
        if prefix > leading and size is not None:
            rows, columns = self.grid(size)
            raise ConfigError(
                f"{found} are the same for any image, and the others as many as an image of {self.size[0]}x"
                f"{self.size[1]} has patches ({rows}x{columns}): there seem to be {leading} prefix tokens"
            )


def _listed(places: Sequence[int]) -> str:
    shown = ", ".join(map(str, places[:4])) + (f" to {places[-1]}" if len(places) > 4 else "")
    return f"{'number' if len(places) == 1 else 'numbers'} {shown}"


def try_out(model: nn.Module, host: str, block: str, channels: int, images: Tensor | None = None) -> Tried | None:
    """Run a model on an image, and on another one, until it reaches a block.

    Args:
        model: Left as it is; a copy on the same weights runs.
        host: Path of the module that walks over the blocks.
        block: Path of the first.
        channels: `C`.
        images: `(B, 3, height, width)`, of which one is taken; without any, random ones of sizes that are likely.

    Returns:
        None where no images were given, and the model takes none of any likely size alone.

    Raises:
        UnsupportedModelError: If the model doesn't run on the images, or not through the block.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if images is not None:
        return _both(_Run(model, host, block), images[:1])
    if like is None or like.is_meta:
        return None
    run, first = _Run(model, host, block), first_convolution(model)
    for size in likely_sizes(model, channels):
        image = _noise(like.new_empty(1, 3 if first is None else first.in_channels, *size), _SEEDS[0])
        try:
            return _both(run, image)
        except UnsupportedModelError:
            continue
    return None


def _both(run: _Run, image: Tensor) -> Tried:
    tokens, inputs, to_host = run(image)
    try:
        others: Tensor | None = run(_noise(image, _SEEDS[1]))[0]
    except UnsupportedModelError:
        others = None
    return Tried(run.block, (image.shape[2], image.shape[3]), tokens, others, inputs, to_host)


def _noise(like: Tensor, seed: int) -> Tensor:
    # Real images may share a part, such as a border.
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


class _ReachedError(BaseException):
    """Ends a forward at its first block, past whoever catches exceptions."""


class _Run:
    """Runs a copy of a model, without anybody's hooks, until it reaches a block."""

    def __init__(self, model: nn.Module, host: str, block: str) -> None:
        self.block = block
        self._copy = shared_copy(model).eval()
        for module in self._copy.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self._to_host: list[Any] = []
        self._seen: tuple[Tensor, dict[str, Any]] | None = None
        self._copy.get_submodule(host).register_forward_pre_hook(lambda module, args: self._to_host.extend(args[:1]))
        self._copy.get_submodule(block).register_forward_pre_hook(self._reached, with_kwargs=True)

    def _reached(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(parameters_of(module), args, strict=False)) | kwargs
        first, *others = named
        self._seen = named[first], {name: named[name] for name in others}
        raise _ReachedError

    @torch.no_grad()
    def __call__(self, image: Tensor) -> tuple[Tensor, dict[str, Any], bool]:
        self._seen = None
        self._to_host.clear()
        try:
            # Whatever is random is the same for every image, and nobody else's random numbers change.
            with torch.random.fork_rng([image.device] if image.is_cuda else []):
                # torch.manual_seed would seed every device.
                torch.default_generator.manual_seed(0)
                if image.is_cuda:
                    with torch.cuda.device(image.device):
                        torch.cuda.manual_seed(0)
                self._copy(image)
        except _ReachedError:
            pass
        except Exception as error:  # whatever somebody's model raises
            raise UnsupportedModelError(
                f"{type(self._copy).__name__} can't be run on images {tuple(image.shape)}: {type(error).__name__}: "
                f"{error}"
            ) from error
        if self._seen is None:
            raise UnsupportedModelError(f"{self.block} isn't called when {type(self._copy).__name__} runs on images")
        tokens, inputs = self._seen
        if not isinstance(tokens, Tensor):
            raise UnsupportedModelError(f"{self.block} is given a {type(tokens).__name__}: expected tokens (B, T, C)")
        given = self._to_host[0] if self._to_host else None
        return tokens, inputs, isinstance(given, Tensor) and given.shape == image.shape
