"""Whether a block makes of merged tokens what it makes of all of them, where these are equal.

Then a compact set loses nothing: attention weighs a row by its size, and everything else treats tokens one by one. So
what a row gives has to be what its tokens give, unless something else counts tokens, or takes a mean over them.
"""

from __future__ import annotations

from collections.abc import Callable

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
from ..rewrite.tracing import inputs_of
from . import changes
from .changes import Change
from .probe import Runner, required_inputs, width_of

CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What somebody's module raises that wants other inputs."""
_SIZES = (1, 4, 2, 3)
"""Tokens of each group."""
_KNOWN = {"torch", "timm", "transformers", "torchvision", "peft", "torchao", "bitsandbytes", "accelerate", "evopatch"}
"""Packages whose modules treat tokens one by one outside of attention."""


def is_unknown(block: nn.Module) -> bool:
    """Whether a block holds modules of somebody's own, which may do more than treat tokens one by one."""
    return any(type(module).__module__.partition(".")[0] not in _KNOWN for module in block.modules())


Patch = Callable[[nn.Module, str, HostState], list[Change]]


@torch.no_grad()
def check_merges(block: nn.Module, name: str, spec: HostSpec, patch: Patch) -> None:
    """Run a block on equal tokens, and on one of each, with random weights. One that can't be run so, or takes other
    inputs by token, isn't judged.

    Args:
        block: Left as it is.
        name: Fully qualified, for errors.
        spec: Its host's.
        patch: Gives the changes to a block, by its name and its host's state.

    Raises:
        UnsupportedModelError: If these give something else.
    """
    channels = width_of(block)
    if channels is None or spec.channels_first or spec.joined > 1 or inputs_of(block, spec.trace):
        return
    partition, layout = _partition(spec.prefix), Layout(spec, (0,))
    try:
        runner = Runner(block, name, (*required_inputs(block), *spec.trace.absent))
        partition = partition.to(runner.device)
        x = runner.random(2, partition.rows, channels)
        every = layout.of_block(0, spread(x, partition))
        expected = layout.of_tokens(runner(every, {}))
    except (UnsupportedModelError, *CANNOT_RUN):
        return
    state = HostState("", spec, ((("0",), ("1",)),), EvoConfig(keep_ratio=1.0))
    planned = patch(runner.block, name, state)
    changes.check(planned)
    changes.make(planned)
    key_bias = key_bias_of(partition)
    tap = AttentionTap(
        spec.prefix, spec.readout, partition, observe=False, block=name, key_bias=key_bias, images=len(x)
    )
    try:
        out = run_tapped(runner.block, tap, layout.of_block(0, x, ordered=False), **runner.absent)
    except UnsupportedInputError as error:
        raise UnsupportedModelError(str(error)) from error
    found = layout.of_tokens(Beside(name).tokens_of(out), ordered=False)
    if not runner.equal(spread(found, partition), expected):
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) gives something else for tokens that are merged than for each of several "
            "equal ones: outside of its attention it counts tokens, or mixes them (by a mean or a norm over all of "
            "them, a convolution, or weights after the softmax), which a compact set with fewer tokens would change. "
            "Leave the model unpatched, or write an adapter (docs/adapters.md)"
        )


def group_of_equal() -> tuple[Tensor, Tensor]:
    """The group of every token, and how many each has."""
    sizes = torch.tensor(_SIZES)
    return torch.arange(len(_SIZES)).repeat_interleave(sizes), sizes


def _partition(prefix: int) -> Partition:
    """Of two images, with groups of so many tokens, the other way round in the second one."""
    group, sizes = group_of_equal()
    rows = prefix + len(_SIZES)
    group = with_prefix(torch.stack([group, len(sizes) - 1 - group]), prefix)
    number = torch.stack([torch.bincount(each, minlength=rows) for each in group]).float()
    slow = torch.zeros(2, int(sizes.sum()), dtype=torch.bool)
    return Partition(group, (1.0 / number).gather(1, group), slow, number.log(), rows)
