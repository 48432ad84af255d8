"""Fit foresight: what a patched model's blocks rank tokens by, learned from a few images in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.foresight import Regression
from ..config import EvoConfig
from ..forward.block import unwrapped
from ..forward.guarded import GuardedBlock
from ..forward.host_state import HostState
from ..forward.learned import FORESIGHT, give
from ..forward.look_ahead import Look
from ..plan import BlockPlan
from .given_images import run_on
from .handle import Host, Patched

AT_ONCE = 16
"""Images of one forward."""
_WATCHED = BlockPlan(keep_ratio=1.0, selects=False, ends=False, tradeoff=1.0)
"""All tokens, and the block's own class attention."""


@torch.no_grad()
def fit_foresight(model: nn.Module, images: Tensor) -> None:
    """Give every block of a patched flat model its foresight, by the unpatched model's forwards.

    Args:
        model: A patched model; what the blocks of its flat hosts had before is replaced.
        images: `(B, 3, height, width)` as the model expects them, on its device.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        DataError: If what the model makes of the images isn't finite.
    """
    patched = Patched(model)
    hosts = {name: host for name, host in patched.hosts.items() if is_flat(host)}
    watched = _watched(patched, hosts)
    sums: dict[str, dict[int, Regression]] = {name: {} for name in hosts}
    for batch in images.split(AT_ONCE):
        run_on(watched.model, batch)
        for name in hosts:
            _add(blocks_of(watched, watched.hosts[name]), watched.hosts[name].state, sums[name])
    for name, host in hosts.items():
        for index, block in enumerate(blocks_of(patched, host)):
            if index in sums[name]:
                give(block, FORESIGHT, sums[name][index].weights())


def blocks_of(patched: Patched[Any], host: Host) -> list[nn.Module]:
    """A host's patched blocks, also those that a wrapper holds."""
    found: list[Any] = [unwrapped(patched.model.get_submodule(first), GuardedBlock) for first, *_ in host.blocks()]
    return found


def is_flat(host: Host) -> bool:
    """Whether it has one grid, and attends over all of it."""
    return host.state.spec.pyramid is None and not host.state.spec.windowed


def _watched(patched: Patched[Any], hosts: Iterable[str]) -> Patched[Any]:
    """A copy whose blocks take all tokens and compute their class attention."""
    watched = Patched(patched.copy().eval())
    watched.set_config(EvoConfig(keep_ratio=1.0, readout=False))
    for name in hosts:
        state = watched.hosts[name].state
        state.set_plans((_WATCHED,) * state.depth)
        state.passes = []
    return watched


def _add(blocks: list[nn.Module], state: HostState, sums: dict[int, Regression]) -> None:
    """What one forward saw."""
    passes, state.passes = state.passes or [], []
    for seen in passes:
        coming: Any = 0.0
        for index in range(seen.depth - 1, 0, -1):
            coming = coming + seen.g[index]
            x = seen.entered[index]
            out = seen.mask.left_out
            left_out = None if out is None else out[:, seen.spec.prefix :]
            features = Look(x, {}, seen.spec.prefix, seen.spec.readout).features(blocks[index])
            if index not in sums:
                sums[index] = Regression(features.shape[-1], features.device)
            sums[index].add(features, coming / (seen.depth - index), left_out)
