"""Whether a block makes of merged tokens what it makes of all of them, where these are equal.

Then a compact set loses nothing: attention weighs a row by its size, and everything else treats tokens one by one. So
what a row gives has to be what its tokens give, unless something else counts tokens, or takes a mean over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..algorithm.bias import key_bias_of
from ..algorithm.partition import Partition, spread, with_prefix
from ..config import EvoConfig
from ..errors import UnsupportedInputError, UnsupportedModelError
from ..forward.beside import Beside
from ..forward.block import run_tapped
from ..forward.host_state import HostState
from ..forward.layout import Layout
from ..forward.spec import HostSpec
from ..forward.tap import AttentionTap
from ..rewrite.tracing import attention_cores, inputs_of, parameters_of
from . import changes
from .changes import Change
from .probe import Runner, required_inputs, trying, width_of

_SIZES = (1, 4, 2, 3)
"""Tokens of each group."""
_SQUARE = (2, 5, 3, 6)
"""The same for modules that lay their tokens out as a map: as many tokens as a square has, and as many groups."""
_KNOWN = {"torch", "timm", "transformers", "torchvision", "peft", "torchao", "bitsandbytes", "accelerate", "evopatch"}
"""Packages whose modules treat tokens one by one outside of attention, but for those that follow."""
_pooling = nn.modules.pooling
_MIXING = (
    _pooling._AvgPoolNd, _pooling._MaxPoolNd, _pooling._AdaptiveAvgPoolNd,
    _pooling._AdaptiveMaxPoolNd, _pooling._LPPoolNd, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.Flatten,
    nn.Unflatten, nn.Upsample, nn.RNNBase,
)  # fmt: skip
_MIXING_BY_NAME = {"Permute", "GlobalResponseNorm"}
"""Of torchvision and timm, which needn't be there."""


def is_unknown(block: nn.Module) -> bool:
    """Whether a block holds modules that may do more than treat tokens one by one: somebody's own, or a library's that
    mix tokens, or move them to where others do."""
    return any(map(_is_own, block.modules()))


def _is_own(module: nn.Module) -> bool:
    return is_foreign(module) or _mixes(module)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is somebody's own."""
    return type(module).__module__.partition(".")[0] not in _KNOWN


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return set(module.kernel_size) != {1}
    return isinstance(module, _MIXING) or type(module).__name__ in _MIXING_BY_NAME


Patch = Callable[[nn.Module, str, HostState], list[Change]]


@torch.no_grad()
def check_merges(block: nn.Module, name: str, spec: HostSpec, patch: Patch) -> None:
    """Run a block on equal tokens, and on one of each, with random weights. Where its attention is made for another
    number of tokens, as by a position bias, the modules of somebody's own in it that don't attend run alone. A
    block that takes other inputs by token isn't judged.

    Args:
        block: Left as it is.
        name: Fully qualified, for errors.
        spec: Its host's.
        patch: Gives the changes to a block, by its name and its host's state.

    Raises:
        UnsupportedModelError: If these give something else, or can't be run so.
    """
    channels = width_of(block)
    if channels is None or spec.channels_first or spec.joined > 1 or inputs_of(block, spec.trace):
        return
    absent = set(spec.trace.absent).intersection(parameters_of(block))
    runner = Runner(block, name, (*required_inputs(block), *absent))
    case = _case(runner, Layout(spec, (0,)), spec.prefix, channels)
    if isinstance(case, UnsupportedModelError):
        for path, part in _unknown_parts(block, name, spec):
            _check_part(part, path, spec.prefix, channels)
        return
    # In which of its host's stages it is doesn't matter here.
    state = HostState("", dataclasses.replace(spec, start=None), ((("0",), ("1",)),), EvoConfig(keep_ratio=1.0))
    planned = patch(runner.block, name, state)
    changes.check(planned)
    changes.make(planned)
    tap = AttentionTap(
        spec.prefix,
        spec.readout,
        case.partition,
        observe=False,
        block=name,
        key_bias=key_bias_of(case.partition),
        images=len(case.x),
    )
    layout = case.layout
    try:
        with trying(block, name, case.x, f"Patched, these stand for {case.expected.shape[1]}. {_LEAVE}"):
            out = run_tapped(runner.block, tap, layout.of_block(0, case.x.clone(), ordered=False), **runner.absent)
    except UnsupportedInputError as error:
        raise UnsupportedModelError(str(error)) from error
    found = layout.of_tokens(Beside(name).tokens_of(out), ordered=False)
    _check_same(runner, found, case, block, name, "outside of its attention it")


_LEAVE = "Leave the model unpatched, or write an adapter (docs/adapters.md)"


class _Case(NamedTuple):
    """Equal tokens, and what is to come out."""

    partition: Partition
    layout: Layout
    x: Tensor
    """`(B, rows, C)`, one of each group."""
    expected: Tensor
    """`(B, T, C)`, what all of them give."""


def _case(runner: Runner, layout: Layout, prefix: int, channels: int) -> _Case | UnsupportedModelError:
    """The first number of tokens that a module can be run on; why it can't, if there is none."""
    refused = None
    for sizes in (_SIZES, _SQUARE):
        partition = _partition(prefix, sizes).to(runner.device)
        x = runner.random(2, partition.rows, channels)
        try:
            out = runner(layout.of_block(0, spread(x, partition)), {})
        except UnsupportedModelError as error:
            refused = error
        else:
            return _Case(partition, layout, x, layout.of_tokens(out))
    assert refused is not None
    return refused


def _check_same(runner: Runner, found: Tensor, case: _Case, module: nn.Module, name: str, where: str) -> None:
    if found.shape != case.x.shape or not runner.equal(spread(found, case.partition), case.expected):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) gives something else for tokens that are merged than for each of "
            f"several equal ones: {where} counts tokens, or mixes them (by a mean or a norm over all of them, a "
            "convolution, or weights after the softmax), which a compact set with fewer tokens would change. "
            f"{_LEAVE}"
        )


def _unknown_parts(module: nn.Module, name: str, spec: HostSpec) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of somebody's own in a block that don't attend, by name.

    Args:
        module: The block, or one in it.
        name: Its, fully qualified.
        spec: Its host's.
    """
    if _is_own(module) and not attention_cores(module, spec.trace):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _unknown_parts(child, f"{name}.{child_name}", spec)


def _check_part(part: nn.Module, name: str, prefix: int, channels: int) -> None:
    """The same as `check_merges`, of a module that doesn't attend."""
    runner = Runner(part, name, required_inputs(part))
    case = _case(runner, Layout(HostSpec("", prefix, 0), (0,)), prefix, width_of(part) or channels)
    if isinstance(case, UnsupportedModelError):
        raise case
    _check_same(runner, runner(case.x, {}), case, part, name, "it")


def group_of_equal(sizes: tuple[int, ...] = _SIZES) -> tuple[Tensor, Tensor]:
    """The group of every token, and how many each has."""
    number = torch.tensor(sizes)
    return torch.arange(len(sizes)).repeat_interleave(number), number


def _partition(prefix: int, sizes: tuple[int, ...]) -> Partition:
    """Of two images, with groups of so many tokens, the other way round in the second one."""
    group, number = group_of_equal(sizes)
    rows = prefix + len(sizes)
    group = with_prefix(torch.stack([group, len(sizes) - 1 - group]), prefix)
    number = torch.stack([torch.bincount(each, minlength=rows) for each in group]).float()
    slow = torch.zeros(2, sum(sizes), dtype=torch.bool)
    return Partition(group, (1.0 / number).gather(1, group), slow, number.log(), rows)
