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
        UnsupportedModelError: If tokens of other windows change what those of one give, or its attention makes
            something else of tokens that are merged than of each, or it can't be run so.
    """
    norm = next((module for module in block.children() if isinstance(module, nn.LayerNorm)), None)
    if norm is None:
        return
    channels, runner = norm.normalized_shape[-1], Runner(block, name, ())
    if not _windows_apart(runner, kind, channels):
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) mixes tokens of different windows: something outside of its attention "
            "does so (such as a convolution, or a mean or a norm over all tokens), which would meet merged tokens in "
            "other places. Leave the model unpatched, or write an adapter (docs/adapters.md)"
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
    changed = torch.where(inside.view(1, *x.shape[1:3], 1), x, -x)
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
