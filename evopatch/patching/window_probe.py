"""Whether a windowed block mixes tokens in its windows' attention, and nowhere else; and what its attention makes of
merged tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..forward.window_blocks import BiasedBlocks, WindowedBlocks
from ..forward.windowed import alone
from ..rewrite.classes import Steered
from . import changes
from .changes import Change
from .merge_probe import group_of_equal, is_unknown
from .probe import Runner, trying

_EXPECTED = (
    "Expected a block of its library in which your own modules run on any number of tokens. Leave the model unpatched, "
    "or write an adapter (docs/adapters.md)"
)
_SIDE = 32
"""Of a map, in tokens: windows are up to 24 by 24."""


@torch.no_grad()
def check_windows(block: nn.Module, name: str, kind: WindowedBlocks) -> None:
    """Run a block that has modules of somebody's own on random tokens, with random weights.

    Args:
        block: Left as it is.
        name: Fully qualified, for errors.
        kind: What is to know about it.

    Raises:
        UnsupportedModelError: If tokens of other windows change what those of one give, or outside of its attention
            other tokens, their number or its place change what one gives, or its attention makes something else of
            tokens that are merged than of each, or it can't be run so.
    """
    channels = _width(block)
    if channels is None:
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) holds modules of your own, and none of its own norms says how many "
            f"channels it has, so that it can't be tried on tokens. {_EXPECTED}"
        )
    runner = Runner(block, name, ())
    if not _windows_apart(runner, kind, channels):
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) mixes tokens of different windows: something outside of its attention "
            "does so (such as a convolution, or a mean or a norm over all tokens), which would meet merged tokens in "
            "other places. Leave the model unpatched, or write an adapter (docs/adapters.md)"
        )
    if not _one_by_one(Runner(block, name, ()), kind, channels):
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) doesn't treat tokens one by one outside of its attention: what it gives "
            "for one depends on others (such as by a convolution), on how many there are, or on its place, which "
            "merged tokens would change. Leave the model unpatched, or write an adapter (docs/adapters.md)"
        )
    attention = runner.block.get_submodule(kind.attention)
    if not isinstance(kind, BiasedBlocks) or not is_unknown(attention):
        return
    # A view calls them with what to run in their place, as it does in a patched block.
    changes.make([Change(attention.get_submodule(path), Steered, {}) for path in kind.inside_attention])
    if not _merges(runner, attention, kind, channels):
        raise UnsupportedModelError(
            f"{name}.{kind.attention} ({type(attention).__name__}) gives something else for tokens that are merged "
            "than for each of several equal ones: beside a softmax over its logits it counts tokens, or mixes them. "
            "Leave the model unpatched, or write an adapter (docs/adapters.md)"
        )


def _width(block: nn.Module) -> int | None:
    """`C`, by the first norm that is a child of a block."""
    for child in block.children():
        shape, weight = getattr(child, "normalized_shape", None), child._parameters.get("weight")
        if shape:
            return int(shape[-1])
        if weight is not None and weight.dim() == 1:
            return len(weight)
    return None


def _one_by_one(runner: Runner, kind: WindowedBlocks, channels: int) -> bool:
    """Whether, with an attention that gives back what it is given, no token changes what others give, and equal ones
    give the same, wherever and however many they are."""
    attention: Any = runner.block.get_submodule(kind.attention)
    attention.register_forward_hook(_given_back, with_kwargs=True)
    sizes = {(_SIDE, _SIDE // 2), tuple(getattr(runner.block, "input_resolution", (_SIDE, _SIDE)))}
    given: list[Tensor] = []
    for size in sorted(sizes):
        x = runner.random(1, *size, channels)
        some = runner.random(1, *size, 1) > 0
        try:
            one = _one(runner, channels)
            before, after = (_run(runner, kind, tokens) for tokens in (x, torch.where(some, one, x)))
            equal = _run(runner, kind, one.expand_as(x))
        except UnsupportedModelError:
            if len(sizes) > 1 and not given:
                continue  # it runs on its own map alone
            raise
        others = ~some.flatten()
        if not runner.equal(after[:, others], before[:, others]):
            return False
        given.append(equal[:, :1])
        if not runner.equal(equal, equal[:, :1].expand_as(equal)):
            return False
    return all(runner.equal(each, given[0]) for each in given)


def _one(runner: Runner, channels: int) -> Tensor:
    """`(1, 1, 1, C)`: as many tokens of this kind as random ones have other norms and means over them."""
    return runner.random(1, 1, 1, channels)


def _given_back(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    x = next(iter((*args, *kwargs.values())))
    return (x, *out[1:]) if isinstance(out, tuple) else x


def _windows_apart(runner: Runner, kind: WindowedBlocks, channels: int) -> bool:
    """Whether no change of other windows' tokens changes those of one."""
    # A shift mask may be made for the block's own map; a block that has but one window there has none.
    for grid in (getattr(runner.block, "input_resolution", (_SIDE, _SIDE)), (_SIDE, _SIDE)):
        x = runner.random(1, *grid, channels)
        cut = kind.cut(runner.block, x, kind.inputs((x.shape[1], x.shape[2])), {})
        if cut.windows.number > 1:
            break
    if cut.joined or cut.windows.number < 2:
        return True
    window = cut.windows.places(runner.device).div(cut.windows.area, rounding_mode="floor")
    inside = window == window[0]
    changed = torch.where(inside.view(1, *x.shape[1:3], 1), x, _one(runner, channels))
    before, after = (_run(runner, kind, tokens) for tokens in (x, changed))
    return runner.equal(after[:, inside], before[:, inside])


def _run(runner: Runner, kind: WindowedBlocks, x: Tensor) -> Tensor:
    """`(1, N, C)` after the block."""
    inputs = kind.inputs((x.shape[1], x.shape[2]))
    given = x.permute(0, 3, 1, 2) if kind.channels_first else x.flatten(1, 2) if kind.flat else x
    with trying(runner.block, runner.name, x, _EXPECTED):
        return alone(runner.block, kind, x.flatten(1, 2), given.clone(), inputs, {})


def _merges(runner: Runner, attention: Any, kind: BiasedBlocks, channels: int) -> bool:
    """Whether an attention among rows, weighted by their sizes, gives what that among equal tokens does."""
    group, sizes = group_of_equal()
    group = group.to(runner.device)
    x, heads = runner.random(1, len(sizes), channels), kind.bias(attention).shape[0]
    log_sizes = sizes.to(x).log().expand(1, heads, len(sizes), -1)
    with trying(attention, f"{runner.name}.{kind.attention}", x, _EXPECTED):
        merged = _attend(attention, kind, x.clone(), log_sizes)
        every = _attend(attention, kind, x[:, group], x.new_zeros(1, heads, len(group), len(group)))
    return runner.equal(merged[:, group], every)


def _attend(attention: Any, kind: BiasedBlocks, windows: Tensor, bias: Tensor) -> Tensor:
    view, given = kind.biased(attention, bias)
    out = view.forward(kind.laid_out(windows), **given)
    tokens: Tensor = out[0] if isinstance(out, tuple) else out
    return tokens.reshape(windows.shape)
